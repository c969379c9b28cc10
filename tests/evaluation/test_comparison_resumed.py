"""Comparisons that fail in part, are interrupted, and go on: nothing is lost, nothing is left on the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_adapters import Memory, MemorySlotsConfig, inject_memory
from memory_adapters.evaluation.comparison.baselines import AppliedBaseline, Baseline, FineTuned, WrittenMemory
from memory_adapters.evaluation.comparison.compare import NOTHING, Comparison, compare
from tests.evaluation.test_baselines import PROMPT
from tests.evaluation.test_comparison import CHEAP, CHOICES, FOLLOWING, FULL, RECIPE, RECORDS, edit, refuse
from tests.support.contract import fingerprint, logits
from tests.support.models import byte_tokenizer, tiny_model

pytestmark = pytest.mark.integration


class Unable(Baseline):
    """Fails with more than `most` facts; with fewer it is the prompt."""

    def __init__(self, error: BaseException, most: int = 0) -> None:
        self.error, self.most = error, most

    @contextmanager
    def applied(self, model: Any, tokenizer: Any, items: Any) -> Iterator[AppliedBaseline]:
        if len(items) > self.most:
            raise self.error
        with PROMPT.applied(model, tokenizer, items) as applied:
            yield applied


def test_what_fails_has_a_reason_and_the_others_go_on(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    state = fingerprint(model)
    given = {
        "unable": Unable(RuntimeError("out of | luck")),
        "short": Unable(ValueError("too many"), most=1),
        "prompt": PROMPT,
    }
    settings = {**CHEAP, "fact_counts": (1,), "folder": tmp_path}
    result = compare(model, tokenizer, RECORDS, given, **settings)
    assert fingerprint(model) == state
    assert {where: one.failed for where, one in result.failures().items()} == {
        "unable, 2 facts": "RuntimeError: out of | luck",
        "short, 2 facts": "ValueError: too many",
        "unable, 1 facts": "RuntimeError: out of | luck",
    }
    assert "raise self.error" in (result.methods["unable"].traceback or "")
    assert result.methods["unable"].report is None
    assert result.methods["prompt"].report is not None
    assert result.curves["short"][1].report is not None
    scores, curve = result.tables()[0].rows, result.tables()[2].rows
    assert [row[0] for row in scores[1:]] == [NOTHING, "unable (failed)", "short (failed)", "prompt"]
    assert set(scores[2][1:]) == {"–"}
    assert curve[2] == ["unable", "failed"]
    assert "failed: unable, 2 facts: RuntimeError: out of | luck" in repr(result)
    assert "- failed: short, 2 facts: ValueError: too many" in result.markdown()
    assert "failed: unable" in result._repr_html_()
    assert Comparison.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith("unable")], "it is tried again"
    again = {**given, "unable": Unable(RuntimeError("out of | luck"), most=2)}
    assert "unable, 1 facts" not in compare(model, tokenizer, RECORDS, again, **{**settings, "folder": None}).failures()


def test_what_fails_of_portability_leaves_the_rest() -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    broken = Unable(RuntimeError("no"), most=1)
    result = compare(model, tokenizer, RECORDS[:1], {"short": broken}, portability=FOLLOWING * 2, **CHEAP)
    found = result.methods["short"]
    assert found.failed == "portability: RuntimeError: no"
    assert found.report is not None
    assert found.portability is None
    assert result.tables()[0].rows[2][0] == "short (failed)"


def test_a_model_that_fails_by_itself_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memory_adapters.evaluation.comparison.tasks.evaluate_edits", refuse)
    with pytest.raises(AssertionError, match="something was measured"):
        compare(tiny_model(), byte_tokenizer(), RECORDS, {"edit": edit()}, **CHEAP)


def test_kept_results_are_read_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    given: dict[str, Any] = {"a/b": WrittenMemory(edit(), {"progress": False}), "prompt": PROMPT}
    settings = {**FULL, "folder": tmp_path}
    first = compare(model, tokenizer, RECORDS, given, **settings)
    files = {file.name for file in tmp_path.iterdir()}
    texts = {file.name: file.read_text() for file in tmp_path.iterdir()}
    kinds = ("full-2", "portability-1", "things-1", "documents-1", "curve-1")
    assert files == {f"{name}-{kind}.json" for name in ("nothing", "a%2Fb", "prompt") for kind in kinds}
    for measuring in ("evaluate_edits", "applied_at_cost", "speeds"):
        monkeypatch.setattr(f"memory_adapters.evaluation.comparison.tasks.{measuring}", refuse)
    louder = {**given, "a/b": WrittenMemory(edit(), {"progress": True, "measure": True})}
    assert compare(model, tokenizer, RECORDS, louder, **{**settings, "progress": True}) == first
    (tmp_path / "prompt-documents-1.json").unlink()
    (tmp_path / "prompt-curve-1.json").unlink()
    part = compare(model, tokenizer, RECORDS, given, only_stored=True, **settings)
    assert part.methods["a/b"] == first.methods["a/b"]
    assert part.methods["prompt"] == replace(
        first.methods["prompt"], documents=None, skipped="documents: not measured yet"
    )
    assert part.curves["prompt"][1].skipped == "not measured yet"
    with pytest.raises(ValueError, match=r"has no nothing-full-2\.json, the result of the model alone"):
        compare(model, tokenizer, RECORDS, given, only_stored=True, **{**settings, "folder": tmp_path / "other"})
    for file, text in texts.items():
        (tmp_path / file).write_text(text)
    fewer = {"prompt": PROMPT}
    assert list(compare(model, tokenizer, RECORDS, fewer, **settings).methods) == [NOTHING, "prompt"]
    other: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"a/b": WrittenMemory(edit(steps=5))}, {}, r"a%2Fb-full-2.json.*baseline.source.steps \(4 there, 5 now\)"),
        (given, {"text": "Rome"}, "text "),
        (given, {"greedy": False}, r"greedy \(True there, False now\)"),
        (given, {"choices": CHOICES[:1]}, "choices "),
        (given, {"portability": [replace(FOLLOWING[0], true_target="Chad")]}, "nothing-portability-1.json.*records"),
    ]
    for changed, options, why in other:
        with pytest.raises(ValueError, match=f"{why}.*Give another `folder`, or delete the file"):
            compare(model, tokenizer, RECORDS, changed, **{**settings, **options})
    with pytest.raises(ValueError, match=r"model\.embeddings"):
        compare(tiny_model(seed=1), tokenizer, RECORDS, given, **settings)
    (tmp_path / "prompt-full-2.json").write_text("{")
    with pytest.raises(ValueError, match=r"prompt-full-2.json` is damaged: delete it"):
        compare(model, tokenizer, RECORDS, given, **settings)
    assert {file.name for file in tmp_path.iterdir()} == files


def test_a_saved_memory_counts_by_its_contents(tmp_path: Path) -> None:
    memory = inject_memory(tiny_model(), MemorySlotsConfig(read="all", lora_rank=2), tokenizer=byte_tokenizer())
    memory.save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    memory.write("Rome is old.", progress=False)  # type: ignore[call-arg]
    memory.save_pretrained(tmp_path / "c")
    a, b, c = (WrittenMemory(str(tmp_path / name)).settings() for name in "abc")
    assert a == b != c
    assert set(c["source"]) - set(a["source"]) == {"slots.safetensors"}


def test_interruption_leaves_the_model_whole_and_what_is_done(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    before, state = logits(model), fingerprint(model)
    settings = {**CHEAP, "folder": tmp_path}

    class Interrupted(FineTuned):
        @contextmanager
        def applied(self, model: Any, tokenizer: Any, items: Any) -> Iterator[AppliedBaseline]:
            with super().applied(model, tokenizer, items):
                assert not torch.equal(logits(model), before)
                raise KeyboardInterrupt
                yield

    given: dict[str, Any] = {"prompt": PROMPT, "full": Interrupted(RECIPE), "edit": edit()}
    with pytest.raises(KeyboardInterrupt):
        compare(model, tokenizer, RECORDS, given, **settings)
    assert torch.equal(logits(model), before)
    assert fingerprint(model) == state
    done = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(done) == {"nothing-full-2.json", "prompt-full-2.json"}
    result = compare(model, tokenizer, RECORDS, {**given, "full": FineTuned(RECIPE)}, **settings)
    assert list(result.methods) == [NOTHING, *given]
    assert not result.failures()
    assert {name: (tmp_path / name).read_bytes() for name in done} == done, "what was done is not done again"


def test_a_failed_write_leaves_nothing_and_settings_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    state, given = fingerprint(model), []

    def fail(_self: Memory, _items: Any, **settings: Any) -> Any:
        given.append(settings)
        raise RuntimeError("out of luck")

    monkeypatch.setattr("memory_adapters.MemitMemory.write", fail)
    baseline = WrittenMemory(edit(), {"progress": False})
    result = compare(model, byte_tokenizer(), RECORDS, {"edit": baseline}, **CHEAP)
    assert result.methods["edit"].failed == "RuntimeError: out of luck"
    assert given == [{"progress": False, "measure": False}]
    assert fingerprint(model) == state
