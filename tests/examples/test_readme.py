"""The snippet of the README prints what the README says."""

from __future__ import annotations

import pytest

from memory_adapters.embedded_model import embedded_model
from tests.support.readme import differences, run, snippet
from tests.support.real_model import needs_the_real_model

pytestmark = [*needs_the_real_model, pytest.mark.slow]


def test_snippet() -> None:
    assert differences(run(str(embedded_model())), snippet()[1]) == []
