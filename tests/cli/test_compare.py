"""`memory-adapters compare`: by name, with every cost, resumed, and with what fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from memory_adapters import MemitConfig, MemorySlotsConfig, inject_memory
from memory_adapters.cli.baselines import baseline_names
from memory_adapters.evaluation.comparison.compare import Comparison
from tests.cli.test_cli import JUDGED, PIANO, QUICK, ROME, run, said, words
from tests.support.models import byte_tokenizer, tiny_model

TRAINING = ["learning_rate=0.01", "min_steps=2", "num_train_epochs=1", "num_prefixes=1"]
COMPARED = {
    "gated_lora": ("lora_rank=2", "num_train_epochs=2", "num_prefixes=1"),
    "residual": QUICK["residual"],
    "per_key": (),
    **dict.fromkeys(("memit", "alphaedit", "emmet"), QUICK["memit"]),
    "gated_memit": (*QUICK["memit"], "layers=[1]"),
    **dict.fromkeys(("slots", "retrieval", "message", "refined"), QUICK["slots"]),
    **dict.fromkeys(("lora", "lora_slow", "full"), TRAINING),
    "lora_rehearsed": (*TRAINING, "rehearsal=1"),
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, records, text, and two memories in which nothing is written."""
    folder = tmp_path_factory.mktemp("compare")
    model = tiny_model()
    model.config.max_position_embeddings = 2048  # so that slots fit before 512 tokens of text
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("Rome was not built in a day.")
    (folder / "records.json").write_text(json.dumps([{**ROME, **JUDGED}, {**PIANO, "true_target": "trumpet"}]))
    for name, config in (("memit", MemitConfig()), ("slots", MemorySlotsConfig(lora_rank=2, encoder_steps=1))):
        memory = inject_memory(model, config, tokenizer=byte_tokenizer())
        memory.save_pretrained(folder / name)
        memory.remove()
    return folder


def settings_of(*names: str) -> list[str]:
    return [part for name in names for setting in COMPARED[name] for part in ("--set", f"{name}.{setting}")]


@pytest.mark.integration
def test_compare(here: Path, tmp_path: Path) -> None:
    settings = settings_of(*COMPARED)
    arguments = ["compare", here / "model", here / "records.json", *settings]
    file = tmp_path / "comparison.json"
    result = said(*arguments, "--output", file)
    assert json.loads(file.read_text()) == result
    assert list(result["methods"]) == [
        "nothing",
        *(name for name in baseline_names() if name not in ("encoder", "nothing")),
    ]
    assert set(result["methods"]) == {"nothing", *COMPARED, "prompt"}
    assert all(found["write"]["num_items"] == {"Fact": 2} for found in result["methods"].values())
    edits = {json.dumps(result["methods"][name]["report"]["scores"]) for name in ("memit", "alphaedit", "emmet")}
    assert len({result["methods"][name]["report"]["perplexity"] for name in ("memit", "alphaedit", "emmet")}) == 3, (
        edits
    )
    numbers = {name: found["write"]["num_parameters"] for name, found in result["methods"].items()}
    width, inner = 32, 128
    assert numbers["residual"] > width * inner * 2
    assert numbers["lora"] == 4 * 8 * (width + width + width + 16), "rank 8 on the queries and values of 4 blocks"
    assert numbers["full"] == sum(parameter.numel() for parameter in tiny_model().parameters())
    several = ["--methods", "memit,memit+slots", "--limit", 1, *settings_of("memit", "slots")]
    lines = run(*arguments[:3], *several).stdout.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["nothing", "memit", "memit+slots"]
    assert lines[0] == "Comparison: 1 facts; scores in %"
    assert lines[-1].startswith(("Take ", "None of the methods "))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--methods", "memit+lora"], "memit+lora must join different memories: some of gated_lora, "),
        (["--methods", "memit+memit"], "memit+memit must join different memories"),
        (["--methods", "a,b"], f"'a,b' must name some of {', '.join(baseline_names())}, each once"),
        (["--methods", "memit,memit"], "each once"),
        (["--methods", "memit", "--set", "slots.seed=1"], "must begin with one of memit and a dot"),
        (["--set", "emmet.solver=memit"], "with solver changed, emmet is memit: name that in --methods"),
        (["--set", "lora.step=2"], "lora has no field `step`; it has batch_size, learning_rate"),
        (["--set", "full.rank=2"], "full has no field `rank`"),
        (["--set", "lora.rank=two"], "`lora.rank` must be of the type int, got 'two'"),
        (["--set", "full.min_steps=true"], "`full.min_steps` must be of the type int, got True"),
        (["--methods", "encoder"], "encoder starts from a saved memory: give one with --start slots=ADAPTER"),
        (["--methods", "memit", "--start", "slots=x"], "it is for encoder, refined, which --methods leaves out"),
        (["--start", "slots"], "'slots' names no saved memory: write METHOD=ADAPTER"),
        (["--start", "encoder=x"], "'encoder' is no method; give one of"),
        (["--start", "slots=MEMIT"], "is of the method memit; give one of slots"),
        (["--methods", "slots", "--set", "slots.covariance=c0"], "slots has no field or option `covariance`; it has"),
        (["--methods", "alphaedit", "--set", "memit.step=2"], "memit has no field or option `step`; it has"),
        (["--methods", "slots", "--set", "slots.progress=false"], "slots has no field or option `progress`; it has"),
        (["--fact-counts", "1,x"], "'1,x' must be counts of facts"),
        (["--fact-counts", "0"], "'0' must be counts of facts"),
        (["--portability", "RECORDS"], "has no questions about what follows"),
    ],
)
def test_compare_used_wrongly(here: Path, options: list[str], why: str) -> None:
    paths = {"slots=MEMIT": f"slots={here / 'memit'}", "RECORDS": here / "records.json"}
    given = [paths.get(option, option) for option in options]
    assert why in words(run("compare", here / "model", here / "records.json", *given, code=2))


@pytest.mark.integration
def test_compare_everything_and_go_on(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zsre = {"subject": "Oslo", "src": "Where is Oslo?", "alt": "Peru", "answers": ["Norway"], "rephrase": "Oslo is in?"}
    zsre |= {"loc": "who is it", "loc_ans": "me", "portability": {"New Question": "Its sea?", "New Answer": "Pacific"}}
    lands = ("Norway", "Italy", "Peru", "Chad")
    known = [{"prompt": f"{land} is", "subject": land, "attribute": land, "relation_id": "P17"} for land in lands]
    for name, rows in (("zsre.json", [zsre]), ("known_1000.json", known)):
        (tmp_path / name).write_text(json.dumps(rows))
    folder = tmp_path / "deep" / "comparison"
    arguments: list[Any] = ["compare", here / "model", here / "records.json", "--folder", folder]
    arguments += ["--methods", "encoder,refined,lora,prompt", "--start", f"slots={here / 'slots'}", "--limit", 1]
    arguments += [
        "--fact-counts",
        "1,2",
        "--portability",
        tmp_path / "zsre.json",
        "--choices",
        tmp_path / "known_1000.json",
    ]
    arguments += ["--fluency", 1, "--text", here / "text.txt", *settings_of("lora"), "--set", "lora.rank=1"]
    arguments += ["--set", "refined.refine_steps=1", "--set", 'lora.training_args={"adam_beta2": 0.99}']
    result = said(*arguments)
    assert json.loads((folder / "comparison.json").read_text()) == result
    assert Comparison.from_dict(result).markdown() == (folder / "comparison.md").read_text()
    for name in ("quality_damage.png", "quality_cost.png", "curves.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    methods = result["methods"]
    assert list(methods) == ["nothing", "encoder", "refined", "lora", "prompt"]
    losses = {name: len(found["write"]["losses"]) for name, found in methods.items()}
    assert losses["encoder"] == 0 < losses["refined"], "one as it is, the other refined"
    for found in methods.values():
        assert found["report"]["num_records"] == found["portability"]["num_records"] == 1
        assert found["ability"] is not None
        assert found["report"]["fluency"] is not None
    assert all(list(line) == ["1", "2"] for line in result["curves"].values())
    assert len(list((folder / "results").iterdir())) == 3 * len(methods)
    monkeypatch.setattr("memory_adapters.evaluation.comparison.tasks.evaluate_edits", Mock(side_effect=AssertionError))
    assert said(*arguments, "--quiet") == result
    assert "measured with other settings: baseline.recipe.seed" in words(
        run(*arguments, "--set", "lora.seed=1", code=1)
    )
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (folder / "comparison.md").unlink()
    assert "no figures: Plots need matplotlib: run `pip install" in words(run(*arguments))
    assert (folder / "comparison.md").is_file()


def test_compare_with_a_method_that_fails(here: Path, tmp_path: Path) -> None:
    facts = [{**ROME, "subject": "Eiffel Tower", "prompt": f"{'Very ' * 300}old is the Eiffel Tower in"}] * 2
    (tmp_path / "long.json").write_text(json.dumps(facts))
    arguments = [
        "compare",
        here / "model",
        tmp_path / "long.json",
        "--methods",
        "prompt",
        "--folder",
        tmp_path / "kept",
    ]
    result = run(*arguments, code=3)
    assert "prompt (failed)" in result.stdout
    assert "failed: prompt, 2 facts" in words(result)
    assert "Traceback" not in result.stderr
    assert "Traceback" in run(*arguments, "--debug", code=3).stderr
    kept = json.loads((tmp_path / "kept" / "comparison.json").read_text())
    assert kept["methods"]["prompt"]["failed"]
    assert [file.name for file in (tmp_path / "kept" / "results").iterdir()] == ["nothing-full-2.json"]
