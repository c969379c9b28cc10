"""Stored results: which settings they count for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from memory_adapters.evaluation.comparison.stored_results import StoredResults


@dataclass
class Before:
    rank: int = 4


@dataclass
class After(Before):
    both_ways: bool = False


@pytest.mark.parametrize("nest", [lambda config: {"config": config}, lambda config: {"all": [{"config": config}]}])
def test_a_result_that_is_older_than_a_field_has_its_default(tmp_path: Path, nest: Any) -> None:
    results = StoredResults(tmp_path)
    results.save("row", nest(Before()), {"score": 1})
    assert results.read("row", nest(After())) == {"score": 1}
    with pytest.raises(ValueError, match=r"config.both_ways \(False there, True now\)"):
        results.read("row", nest(After(both_ways=True)))
    with pytest.raises(ValueError, match=r"config.rank \(4 there, 5 now\)"):
        results.read("row", nest(After(5)))
    results.save("row", nest(After()), {"score": 1})
    with pytest.raises(ValueError, match=r"config.both_ways \(False there, None now\)"):
        results.read("row", nest(Before()))
