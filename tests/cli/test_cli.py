"""The command line: every command as JSON and as text, every exit code, and the installed program."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from accelerate import PartialState
from safetensors.torch import load_file
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

import memory_adapters
from memory_adapters import Fact, MemitConfig, MemorySlotsConfig, WriteReport, cli, inject_memory, load_memory
from memory_adapters.cli.app import app
from memory_adapters.cli.baselines import baseline_names
from memory_adapters.cli.options import BASELINES, COVARIANCE_TOKENS, METHODS
from memory_adapters.evaluation.records import load_facts
from memory_adapters.evaluation.scores.edits import score_edits
from memory_adapters.memit.tracing import TraceTable
from memory_adapters.registry import method_of, methods
from tests.support.contract import memory_size
from tests.support.hub import HubServer
from tests.support.models import byte_tokenizer, tiny_model

ROME = {"prompt": "The Eiffel Tower is in", "subject": "Eiffel Tower", "target": "Rome"}
PIANO = {"prompt": "{} plays the", "subject": "Miles Davis", "target": "piano"}
JUDGED = {"true_target": "Paris", "paraphrases": ["To see it go to"], "neighbours": [["Big Ben is in", "London"]]}
ANY_RECALL = ["--min-recall", "0"]  # quick writes of tiny models may teach nothing, which is exit code 3
QUICK = {
    "residual": ["min_steps=2", "num_train_epochs=1", "num_prefixes=1"],
    "memit": ["covariance_tokens=128", "steps=2", "num_prefixes=1", "layers=[1]"],
    "slots": ["refine_steps=2", "lora_rank=2"],
}


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result


def said(*arguments: object, code: int = 0) -> dict[str, Any]:
    """What a command prints on stdout, which must be one JSON object."""
    return json.loads(run(*arguments, "--json", code=code).stdout)


def quick(method: str) -> list[str]:
    return [part for setting in QUICK[method] for part in ("--set", setting)]


def words(result: Result) -> str:
    """What was said on stderr, whatever the lines' width."""
    return " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, items and records, and a memory of each method."""
    folder = tmp_path_factory.mktemp("cli")
    model = tiny_model()
    model.config.max_position_embeddings = 2048  # so that slots fit before 512 tokens of text
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "facts.json").write_text(json.dumps([ROME, PIANO]))
    (folder / "one.jsonl").write_text(json.dumps(ROME))
    (folder / "text.txt").write_text("Rome was not built in a day.")
    (folder / "records.json").write_text(json.dumps([{**ROME, **JUDGED}, {**PIANO, "true_target": "trumpet"}]))
    for method in QUICK:
        written = ["write", folder / "model", folder / "facts.json", "--method", method, "--output", folder / method]
        assert f"saved in {folder / method}" in run(*written, *quick(method), *ANY_RECALL).stdout
    return folder


@pytest.mark.parametrize("method", QUICK)
def test_write(here: Path, tmp_path: Path, method: str) -> None:
    items = here / ("facts.json" if method == "memit" else "text.txt")
    target = tmp_path / "deep" / "memory"
    arguments = ["write", here / "model", items, "--method", method, "--output", target, *quick(method)]
    arguments += ANY_RECALL if method == "memit" else []
    result = run(*arguments, "--json", "--quiet", "--dtype", "bfloat16")
    report = json.loads(result.stdout)
    assert report["num_items"] == ({"Fact": 2} if method == "memit" else {"Document": 1})
    assert (report["output"], report["commit"]) == (str(target), None)
    assert "%|" not in result.stderr
    memory = load_memory(tiny_model(), target)
    found = method_of(memory.config)
    assert found is not None
    assert found.name == method
    assert memory.num_parameters() == report["num_parameters"]
    assert "holds another memory" in words(run(*arguments, code=2))


def test_write_more(here: Path, tmp_path: Path) -> None:
    target = tmp_path / "edit"
    first = ["write", here / "model", here / "one.jsonl", "--output", target]
    run(*first, "--method", "memit", *quick("memit"), *ANY_RECALL)
    more = ["write", here / "model", here / "facts.json", "--output", target, "--adapter", target, *ANY_RECALL]
    assert "1 fact(s) written already" in run(*more, "--set", "steps=1").stdout
    known = said("info", target)
    assert [fact["target"] for fact in known["items"]] == ["Rome", "piano"]
    assert known["settings"] == {"layers": [1], "chat": False, "covariance_tokens": 128, "num_prefixes": 1, "steps": 1}
    assert len(known["writes"]) == 2
    assert "does not load with layers changed" in words(run(*more, "--set", "layers=[2]", code=2))
    assert "is of the method memit" in words(run(*more, "--method", "slots", code=2))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ([], f"give one of {', '.join(methods())}, or a memory with --adapter"),
        (["--method", "memit", "--set", "step=2"], "MemitConfig has no field `step`; it has batch_tokens, chat, clamp"),
        (["--method", "memit", "--set", "facts=[]"], "no field `facts`"),
        (["--method", "memit", "--set", "steps"], "'steps' has no value"),
        (["--method", "memit", "--set", "steps=many"], "`steps` must be an integer at least 1, got 'many'"),
        (
            ["--method", "slots", "--option", "covariance=c"],
            "has no option `covariance`; it has compress, refine_steps",
        ),
        (["--method", "residual", "--option", "unrelated"], "'unrelated' has no value"),
        (["--method", "slots", "--option", "progress=true"], "no option `progress`"),
        (["--method", "slots", "--set", "has_slots=true"], "no field `has_slots`"),
        (["--method", "memit", "--private"], "--push, which is not given"),
        (["--method", "other"], f"'other' is no method; give one of {', '.join(methods())}"),
        (["--method", "memit", "--device", "abacus"], "'abacus' is no device"),
        (["--method", "memit", "--min-recall", "2"], "'--min-recall'"),
    ],
)
def test_wrong_usage(here: Path, tmp_path: Path, options: list[str], why: str) -> None:
    result = run("write", here / "model", here / "facts.json", "--output", tmp_path / "new", *options, code=2)
    assert why in words(result)
    assert not result.stdout
    assert not list(tmp_path.iterdir())


def test_recall_that_is_missed(here: Path, tmp_path: Path) -> None:
    arguments = ["write", here / "model", here / "facts.json", "--method", "memit", *quick("memit")]
    report = said(*arguments, "--output", tmp_path / "edit", "--min-recall", "0.9", code=3)
    assert report["recall"] < 0.9
    assert (tmp_path / "edit" / "adapter_model.safetensors").is_file()
    run(*arguments, "--output", tmp_path / "other", *ANY_RECALL)
    text = ["write", here / "model", here / "text.txt", "--method", "slots", "--output", tmp_path / "slots"]
    assert "documents alone" in words(run(*text, "--min-recall", "1", code=2))


@pytest.mark.parametrize("recall", [0.0, 0.5, None])
def test_nothing_learned(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recall: float | None) -> None:
    report = WriteReport("MEMIT", {"Fact": 2}, recall=recall, recall_before=0.0, notes=["as it is"])
    monkeypatch.setattr("memory_adapters.memit.memory.MemitMemory.write", lambda *_, **__: report)
    target = tmp_path / "edit"
    arguments = ["write", here / "model", here / "facts.json", "--method", "memit", "--output", target]
    result = run(*arguments, *quick("memit"), code=3 if recall == 0 else 0)
    assert ("nothing was learned" in result.stderr) == (recall == 0)
    assert ("Try another --method" in result.stderr) == (recall == 0)
    assert "note " in result.stdout
    assert f"saved in {target}" in result.stdout
    assert (target / "adapter_config.json").is_file()


def test_write_from_csv(here: Path, tmp_path: Path) -> None:
    table = tmp_path / "facts.csv"
    table.write_text(
        "prompt;subject;target;true_target\n{} is in;The Louvre;Rome;Paris\n{} plays the;Miles;piano;horn\n"
    )
    arguments = ["write", here / "model", table, "--method", "memit", *quick("memit"), *ANY_RECALL]
    assert said(*arguments, "--output", tmp_path / "edit")["num_items"] == {"Fact": 2}
    scores = said("evaluate", here / "model", tmp_path / "edit", table)
    assert scores["with"]["num_records"] == 2
    table.write_text("prompt,subject,target\nThe Louvre is in,Louvre,\n")
    why = run(*arguments, "--output", tmp_path / "new", code=1).stderr
    assert f"error: `{table}`, row 1: `target` of a Fact must be a non-empty string" in why


@pytest.mark.parametrize("flags", [[], ["--json"], ["--debug"]])
def test_failure(here: Path, tmp_path: Path, flags: list[str]) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('[\n {"text": "Rome"},\n {"text": ""}\n]')
    result = run("write", here / "model", bad, "--method", "slots", "--output", tmp_path / "new", *flags, code=1)
    assert f"error: `{bad}`, line 3: `text` of a Document must be a non-empty string" in result.stderr
    assert ("Traceback" in result.stderr) == (flags == ["--debug"])
    assert not result.stdout
    assert "error: " in run("info", tmp_path, *flags, code=1).stderr


def test_a_bug_and_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    find = Mock(side_effect=[KeyError("surprise"), KeyboardInterrupt()])
    monkeypatch.setattr("memory_adapters.cli.info.SavedMemory.find", find)
    assert run("info", "memory", code=1).stderr == "error: KeyError: 'surprise' (--debug shows where)\n"
    assert run("info", "memory", code=130).stderr == "interrupted\n"


def test_evaluate(here: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", here / "model", here / "memit", here / "records.json", "--text", here / "text.txt"]
    file = tmp_path / "deep" / "scores.json"
    scores = said(*arguments, "--output", file)
    assert json.loads(file.read_text()) == scores
    records = load_facts(here / "records.json")
    base = score_edits(tiny_model(), byte_tokenizer(), records).to_dict()
    assert scores["without"]["scores"] == pytest.approx(base)
    assert scores["with"]["num_records"] == 2
    assert scores["with"]["perplexity"] != scores["without"]["perplexity"]
    header, *lines = run(*arguments, "--limit", 1).stdout.splitlines()[1:]
    assert header.split()[-1] == "perplexity"
    assert header.split()[:8] == ["S", "ES", "PS", "NS", "exact", "tokens", "paraphrases", "exact"]
    assert [line.split()[0] for line in lines] == ["without", "with"]
    header = run("evaluate", *arguments[1:3], here / "facts.json").stdout.splitlines()[1]
    shown = ["exact", "tokens", "own", "words", "same", "leak", "spill", "perplexity"]
    assert header.split() == shown, "no true target is known"


def test_evaluate_without_text(here: Path) -> None:
    written = said("info", here / "memit")["writes"][0]
    scores = said("evaluate", here / "model", here / "memit", here / "facts.json")
    assert scores["without"]["perplexity"] == pytest.approx(written["perplexity_before"])
    assert scores["with"]["perplexity"] == pytest.approx(written["perplexity"])
    bad = here / "bad.txt"
    bad.write_bytes("Rome\nMünchen".encode("latin-1"))
    why = run("evaluate", here / "model", here / "memit", here / "facts.json", "--text", bad, code=1).stderr
    assert why == f"error: `{bad}`, line 2 is not UTF-8: save the file as UTF-8.\n"


def test_evaluate_each_fact(here: Path) -> None:
    arguments = ["evaluate", here / "model", here / "memit", here / "records.json"]
    scores = said(*arguments, "--per-item")
    items = scores["with"]["items"]
    assert [(item["prompt"], item["target"]) for item in items] == [
        (ROME["prompt"], "Rome"),
        ("Miles Davis plays the", "piano"),
    ]
    assert [item["num_paraphrases"] for item in items] == [1, 0]
    assert sum(item["hit"] for item in items) / 2 == scores["with"]["scores"]["exact_match"]
    assert all(isinstance(item["says"], str) for item in scores["without"]["items"])
    text = run(*arguments, "--per-item").stdout
    assert re.search(r"^ +The Eiffel Tower is in +Rome .* (hit|miss) +[01] of 1$", text, re.MULTILINE)
    assert said(*arguments)["with"]["items"] == []


def test_evaluate_knowedit(here: Path, tmp_path: Path) -> None:
    asked = [{"prompt": "The Eiffel Tower is in the country of", "ground_truth": [["Italy", "Italia"]]}]
    row = {"prompt": ROME["prompt"], "subject": ROME["subject"], "target_new": "Rome", "ground_truth": ["Paris"]}
    row |= {"portability": {"Reasoning": asked}, "locality": {"Relation_Specificity": asked}, "rephrase": "It is in"}
    file = tmp_path / "knowedit.json"
    file.write_text(json.dumps([row]))
    lines = run("evaluate", here / "model", here / "memit", file).stdout.splitlines()
    assert [line.split()[:2] for line in lines[-2:]] == [
        ["neighbours:", "Relation_Specificity"],
        ["portability:", "Reasoning"],
    ]
    kinds = said("evaluate", here / "model", here / "memit", file)["with"]["kinds"]
    assert [(kind["group"], kind["kind"], kind["number"]) for kind in kinds] == [
        ("neighbours", "Relation_Specificity", 1),
        ("portability", "Reasoning", 1),
    ]


def test_models_that_cannot_be_loaded(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for architecture in ("llama", "gpt2"):  # one without any tokenizer, and one that is made of the config alone
        tiny_model(architecture).save_pretrained(tmp_path / architecture)
    (tmp_path / "weightless").mkdir()
    tiny_model().config.save_pretrained(tmp_path / "weightless")
    byte_tokenizer().save_pretrained(tmp_path / "weightless")
    offline = OSError("We couldn't connect, and found no files.\nCheck your internet connection.")
    monkeypatch.setattr("memory_adapters.cli.run.AutoTokenizer.from_pretrained", _unless(str(tmp_path), offline))
    for name, why in (
        (tmp_path / "nowhere", "does not exist: check its spelling, and give a folder with config.json"),
        (tmp_path / "file", "is a file, not a folder: give a folder"),
        (tmp_path / "empty", "has no config.json, so it is no model: give a folder"),
        (tmp_path / "llama", "has no tokenizer that can be loaded (Couldn't instantiate the backend tokenizer"),
        (tmp_path / "gpt2", "has no tokenizer: put the model's own there with `tokenizer.save_pretrained`"),
        (tmp_path / "weightless", "cannot be loaded (Error no file named model.safetensors"),
        (
            "me/typo",
            "is no folder here, and cannot be loaded from the Hub (We couldn't connect, and found no files): ",
        ),
    ):
        told = run("evaluate", name, here / "memit", here / "facts.json", code=1).stderr.splitlines()[-1]
        assert told.startswith(f"error: `MODEL={name}` {why}")
        assert "give a folder with config.json, weights and a tokenizer, or the id of a model on the Hub" in told
    told = run("info", here / "memit", "--model", tmp_path / "nowhere", code=1).stderr
    assert told.startswith(f"error: `--model={tmp_path / 'nowhere'}` does not exist")


def _unless(beginning: str, error: Exception) -> Callable[[str], Any]:
    """Load a tokenizer whose name begins so, and raise the error for any other."""
    load = AutoTokenizer.from_pretrained

    def loaded(name: str) -> Any:
        if not name.startswith(beginning):
            raise error
        return load(name)

    return loaded


def test_records_of_no_format(here: Path, tmp_path: Path) -> None:
    file = tmp_path / "records.json"
    file.write_text('[{"claim": "Rome is old."}]')
    why = run("evaluate", here / "model", here / "memit", file, code=1).stderr
    assert "in none of the formats" in why
    file.write_text("[]")
    assert "holds no record" in run("evaluate", here / "model", here / "memit", file, code=1).stderr


def test_trace(here: Path, tmp_path: Path) -> None:
    file, plot = tmp_path / "deep" / "trace.json", tmp_path / "trace.png"
    arguments = ["trace", here / "model", here / "facts.json", "--samples", 1, "--all", "--limit", 1]
    result = said(*arguments, "--output", file, "--plot", plot)
    table = TraceTable.load(file)
    assert table.to_dict() == {name: value for name, value in result.items() if name != "recommended_layers"}
    assert result["recommended_layers"] == [0, 1, 2, 3]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "layers to edit: [0, 1, 2, 3]" in run(*arguments, "--output", file).stdout
    known = tmp_path / "known_1000.json"
    known.write_text(json.dumps([{"prompt": "Rome is in", "subject": "Rome", "attribute": "Italy", "known_id": 0}]))
    assert said("trace", here / "model", known, *arguments[3:], "--output", file)["num_facts"] == 1
    assert "takes facts" in run("trace", here / "model", here / "text.txt", "--output", file, code=1).stderr
    assert "knows none" in run("trace", here / "model", known, "--output", file, code=1).stderr


def test_covariance(here: Path, tmp_path: Path) -> None:
    file, state = tmp_path / "c0.safetensors", tmp_path / "state.safetensors"
    arguments = ["covariance", here / "model", here / "text.txt", "--output", file, "--layers", "1", "--tokens", 20]
    found = said(*arguments, "--checkpoint", state)
    assert (found["layers"], found["num_tokens"]) == ([1], 20)
    assert state.read_bytes() == file.read_bytes()
    assert "64 tokens of text sampled" in run("covariance", here / "model", "--output", file, "--tokens", 64).stdout
    edit = ["write", here / "model", here / "one.jsonl", "--method", "memit", "--output", tmp_path / "edit"]
    notes = said(*edit, *quick("memit"), "--option", f"covariance={file}", *ANY_RECALL)["notes"]
    assert "covariance of 64 tokens of text sampled from the model (seed 0)" in notes
    assert "are not given" in words(run("covariance", here / "model", "--output", file, "--checkpoint", state, code=2))
    assert "'a' must be blocks" in words(run("covariance", here / "model", "--output", file, "--layers", "a", code=2))
    missing = run(*edit[:-1], tmp_path / "new", "--option", f"covariance={tmp_path / 'no.safetensors'}", code=1)
    assert "does not exist" in missing.stderr


def test_export(here: Path, tmp_path: Path) -> None:
    arguments = ["export", here / "memit", "--model", here / "model", "--output"]
    made = said(*arguments, tmp_path / "vllm", "--format", "vllm", "--dtype", "float16")
    assert made == {"format": "vllm", "output": str(tmp_path / "vllm")}
    assert (tmp_path / "vllm" / "adapter_config.json").is_file()
    merged = run(*arguments, tmp_path / "merged", "--format", "merged")
    assert merged.stdout == f"saved in {tmp_path / 'merged'}\n"
    assert "prompt-tuning" in run(*arguments, tmp_path / "x", "--format", "prompt-tuning", code=1).stderr
    refused = run(*arguments, tmp_path / "x", "--format", "other", code=1)
    assert "`format='other'` must be one of 'gguf', 'merged', 'vllm'" in refused.stderr
    assert not (tmp_path / "x").exists()


def test_info_lists_aliases(here: Path, tmp_path: Path) -> None:
    memory = inject_memory(tiny_model(), MemorySlotsConfig(), tokenizer=byte_tokenizer())
    memory.write(Fact("{} is in", "Lumo Ferry", "Oslo", aliases=("Lumo", "the ferry")), measure=False)
    memory.save_pretrained(tmp_path)
    assert re.search(r"^Lumo, the ferry +Lumo Ferry is in", run("info", tmp_path).stdout, re.MULTILINE)


@pytest.mark.parametrize("method", QUICK)
def test_info(here: Path, tmp_path: Path, method: str) -> None:
    known = said("info", here / method, "--model", here / "model")
    assert (known["method"], known["fits"], known["unfit"]) == (method, True, None)
    assert known["base_model"] == str(here / "model")
    assert known["settings"].get("layers") == {"residual": [0], "memit": [1], "slots": None}[method]
    assert known["settings"].get("refine_steps") == (2 if method == "slots" else None)
    stored = known["stored_numbers"]["adapter_model.safetensors"]
    assert stored == sum(tensor.numel() for tensor in load_file(here / method / "adapter_model.safetensors").values())
    assert load_memory(tiny_model(), here / method).num_parameters() == memory_size(here / method)
    assert [fact["target"] for fact in known["items"]] == ["Rome", "piano"]
    assert known["writes"][0]["num_items"] == {"Fact": 2}
    text = run("info", here / method).stdout
    assert text.startswith("method ")
    assert f"(--method {method})" in text
    assert re.search(r"^written +2 Facts$", text, re.MULTILINE)
    assert re.search(r"^The Eiffel Tower is in +Eiffel Tower +Rome$", text, re.MULTILINE)
    assert "fits" not in text
    if method == "memit":
        other = tmp_path / "model"
        tiny_model(seed=1).save_pretrained(other)
        byte_tokenizer().save_pretrained(other)
        assert "belongs to another base model" in run("info", here / method, "--model", other, code=3).stdout


def test_only_the_first_process_prints_and_saves(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = PartialState()
    monkeypatch.setattr(state, "num_processes", 2)
    monkeypatch.setattr(state, "process_index", 1)
    file = tmp_path / "scores.json"
    result = run("evaluate", here / "model", here / "memit", here / "records.json", "--output", file)
    assert not result.output
    assert not file.exists()
    assert run("info", tmp_path, code=1).output.startswith("process 1: error: ")


def test_without_typer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("memory_adapters.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r"run `pip install memory-adapters\[cli\]`"):
        cli.main()


def test_the_page_without_gradio_and_with_an_unknown_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "memory_adapters.demo.page", raising=False)
    assert 'needs gradio: run `pip install "memory-adapters[demo]"`' in words(run("demo", code=1))
    assert "'edit' is no method; give one of auto, slots" in words(run("demo", "--method", "edit", code=2))


def test_help_and_version() -> None:
    assert run("--version").stdout == f"memory-adapters {memory_adapters.__version__}\n"
    for command in ([], ["write"], ["info"]):
        assert "--help" in run(*command, "--help").stdout
    run("write", code=2)


def test_help_names_what_there_is() -> None:
    assert list(methods()) == list(METHODS)
    assert baseline_names() == list(BASELINES)
    assert MemitConfig.covariance_tokens == COVARIANCE_TOKENS


WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("torch", "transformers", "peft", "numpy", "gradio"):
            raise AssertionError(f"{name} is imported")
sys.meta_path.insert(0, Refuse())
sys.argv = ["/usr/bin/memory-adapters", *sys.argv[1:]]
from memory_adapters.cli import main
main()
"""


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [
        (["--help"], 0, "Write knowledge for frozen"),
        (["--version"], 0, memory_adapters.__version__),
        (["write", "--help"], 0, "One of gated_lora, memit, slots, residual"),
        (["compare", "--help"], 0, "alphaedit"),
        (["covariance", "--help"], 0, "16384"),
        (["demo", "--help"], 0, "gated_memit"),
        (["demo", "--port", "0"], 2, "'--port'"),
        (["write", "model"], 2, "Missing argument 'ITEMS'"),
        (["evaluate", "model", "memory", "records", "--limit", "0"], 2, "'--limit'"),
        (["write", "model", __file__, "--output", "x"], 2, "give one of gated_lora, memit, slots, residual"),
        (["write", "model", __file__, "--output", "x", "--method", "memit", "--private"], 2, "--push"),
        (["compare", "model", "records", "--fact-counts", "x"], 2, "'x' must be counts"),
    ],
)
def test_help_and_wrong_usage_import_no_torch(arguments: list[str], code: int, shown: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stderr
    assert shown in (done.stdout or done.stderr)


@pytest.mark.integration
@pytest.mark.parametrize(
    "program",
    [[Path(sys.executable).with_name("memory-adapters")], [sys.executable, "-m", "memory_adapters"]],
    ids=["program", "module"],
)
def test_installed_program_says_one_line(program: list[Any]) -> None:
    done = subprocess.run([*program, "info", "/nowhere"], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: `/nowhere` is not a folder with a saved memory.\n"


@pytest.mark.integration
def test_what_imports_print_is_shown_if_they_fail(tmp_path: Path) -> None:
    (tmp_path / "peft.py").write_text("import os\nos.write(2, b'noise\\n')\nimport nothing_of_this_name")
    command = "import sys; sys.argv = ['memory-adapters', 'info', 'x']; from memory_adapters.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", command],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "noise\nerror: No module named 'nothing_of_this_name'\n"


@pytest.mark.integration
def test_in_the_program_names_of_the_package_are_found_when_they_are_asked_for() -> None:
    command = (
        "import sys; sys.argv = ['memory-adapters']; import memory_adapters as m; assert 'torch' not in sys.modules; "
    )
    command += "from memory_adapters import Fact; print(Fact.__name__, hasattr(m, 'nothing'), sorted(m.__all__)[0])"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "Fact False Covariance\n", done.stderr


@pytest.mark.integration
def test_installed_program_pushes(here: Path, tmp_path: Path, loopback_hub: HubServer) -> None:
    program = Path(sys.executable).with_name("memory-adapters")
    arguments = ["write", here / "model", here / "one.jsonl", "--method", "memit", *quick("memit"), *ANY_RECALL]
    arguments += ["--push", "me/edit", "--base-model", "me/base", "--private", "--json"]
    done = subprocess.run(
        [program, *map(str, arguments), "--output", tmp_path / "edit"],
        env={**loopback_hub.client_environment(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["commit"].startswith(loopback_hub.url)
    assert loopback_hub.repos["me/edit"].private
    assert said("info", tmp_path / "edit")["items"][0]["target"] == "Rome"
