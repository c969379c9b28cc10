"""Score closed-form edits on CounterFact by solver and number of facts, beside the base model in the same process.

    python benchmarks/edits.py --data FOLDER [--records 100 500 1000] [--work FOLDER]

FOLDER holds counterfact/edit.json and wikitext2/{valid,test}.txt. Target vectors are found once, in writes of 100, and
kept in `--work`, where an interrupted run goes on; every solver and number of facts then solves from the same targets.
With `--covariances` the first records are also solved with C₀ of sampled text and of WikiText-2, at equal tokens; with
`--forget` facts drawn at random are forgotten again, beside a write of the others; with `--slots` the same facts are
read as memory slots; with `--plain` the first facts are written as MEMIT's authors do, one at a time.
Results are saved as they come. Facts are taught outside chats alone, as in the literature.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor

from benchmarks.common import (
    BenchmarkParser,
    counterfact,
    load_model,
    save,
    save_tables,
    score,
    stored,
    table,
    timed,
    wikitext,
)
from benchmarks.plain_memit import PlainMemit
from memory_adapters import Covariance, MemitConfig, MemorySlotsConfig, inject_memory, load_memory
from memory_adapters.base_model.decoder import find_decoder
from memory_adapters.evaluation.records import EditRecord, without_contradictions
from memory_adapters.evaluation.scores.edits import score_edits
from memory_adapters.memit.solvers import SOLVERS
from memory_adapters.memit.write import LedgerBuilder

SCORES = ("exact_match", "efficacy", "paraphrase", "neighbourhood", "score")


def main() -> None:
    parser = BenchmarkParser(__doc__, "edits", data=True)
    parser.add_argument("--records", type=int, nargs="+", default=[40, 100, 500, 1000], quick=[4])
    parser.add_argument("--precision", default="bfloat16", choices=["model", "bfloat16"])
    parser.add_argument("--solvers", nargs="*", choices=sorted(SOLVERS), default=list(SOLVERS), quick=["memit"])
    parser.add_argument(
        "--writes-of", type=int, default=100, quick=2, help="facts, beside one write of all; 0 for that alone"
    )
    parser.add_argument("--covariance-tokens", type=int, default=MemitConfig.covariance_tokens, quick=1000)
    parser.add_argument("--perplexity-tokens", type=int, default=8192, quick=128)
    parser.add_argument("--work", type=Path, default=Path("build/edits"), help="not used by --quick")
    parser.add_argument("--covariances", type=int, nargs="*", default=[], help="token budgets to compare, 40 records")
    parser.add_argument("--regularizations", type=float, nargs="*", default=[], help="of memit, beside the default")
    parser.add_argument("--forget", type=int, default=0, quick=1, help="facts of the largest number, drawn at random")
    parser.add_argument("--slots", action="store_true", help="score memory slots on the same facts, too")
    parser.add_argument("--plain", type=int, default=0, quick=1, help="facts to write by the authors' MEMIT, too")
    arguments = parser.parse()
    model, tokenizer = load_model(arguments)
    records = without_contradictions(counterfact(arguments, max(arguments.records)))
    study = Study(arguments, model, tokenizer, records, wikitext(arguments, "test"), stored(arguments, "rows"))
    for count in arguments.records:
        if f"base, {count}" not in study.rows:
            study.keep(f"base, {count}", records[:count])
    with tempfile.TemporaryDirectory() as temporary:
        targets = study.targets(Path(temporary) if arguments.quick else arguments.work)
    if arguments.plain:
        study.write_as_the_authors(arguments.plain, targets.covariance)
    for budget in arguments.covariances:
        study.compare_covariances(budget, targets)
    study.compare_solvers(targets)
    if arguments.forget:
        study.forget(arguments.forget, targets)
    if arguments.slots:
        study.read_slots()


@dataclass
class Study:
    """Hold a model, the records, and the rows measured so far."""

    arguments: argparse.Namespace
    model: Any
    tokenizer: Any
    records: list[EditRecord]
    text: str
    rows: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)

    def inject(self, **settings: Any) -> Any:
        """Inject an edit that nothing was written to."""
        return inject_memory(
            self.model, MemitConfig(seed=self.arguments.seed, chat=False, **settings), tokenizer=self.tokenizer
        )

    def keep(self, key: str, records: Sequence[EditRecord], seconds: float = 0.0, first: int = 0, **more: Any) -> None:
        """Score the model as it is on records, and save the row."""
        scores = score(self.model, self.tokenizer, records, self.text, self.arguments.perplexity_tokens)
        row = {name: scores[name] for name in (*SCORES, "perplexity")}
        if first:
            scores = score_edits(self.model, self.tokenizer, records[:first]).to_dict()
            row["first"] = {name: scores[name] for name in SCORES}
        self.rows[key] = {"records": len(records), **row, "seconds": seconds, **more}
        about = save(
            self.arguments,
            {"rows": self.rows},
            targets=f"precision={self.arguments.precision}, otherwise the default MemitConfig",
            perplexity=f"WikiText-2 test, first {self.arguments.perplexity_tokens} tokens in windows of 512",
            **self.about,
        )
        save_tables(self.arguments, about, markdown(self.rows))
        print(markdown(self.rows), flush=True)

    def targets(self, work: Path) -> Any:
        """Find the target vectors of all facts, or load those found before; return the memory, switched off."""
        work.mkdir(parents=True, exist_ok=True)
        folder, covariance = work / "memory", work / "covariance.safetensors"
        if folder.exists():
            memory: Any = load_memory(self.model, folder, tokenizer=self.tokenizer)
        else:
            memory = self.inject(precision=self.arguments.precision)
        if covariance.exists():
            memory.covariance = Covariance.load(covariance)
        else:
            spent, _ = timed(memory.fit_covariance, num_tokens=self.arguments.covariance_tokens)
            memory.covariance.save(covariance)
            self.about["covariance"] = f"{memory.covariance}, {spent.wall:.0f} s"
        facts = [record.fact for record in self.records]
        for start in range(len(memory.items), len(facts), 100):
            report = memory.write(facts[start : start + 100])
            print(f"facts {start} to {start + 100}: {report.seconds:.0f} s", flush=True)
            self.about.setdefault("seconds a write of 100", []).append(round(report.seconds, 1))
            memory.save_pretrained(folder)
        memory.active = False
        return memory

    def write(self, memory: Any, count: int, size: int, **settings: Any) -> None:
        """Write the first facts in writes of one size."""
        facts = [record.fact for record in self.records[:count]]
        for start in range(0, count, size):
            memory.write(facts[start : start + size], progress=False, **settings)

    def compare_covariances(self, tokens: int, targets: Any) -> None:
        """Score 40 edits by C₀ of sampled text and of WikiText-2."""
        paragraphs = wikitext(self.arguments, "valid").split("\n")
        for source, texts in {"sampled text": None, "WikiText-2": paragraphs}.items():
            key = f"memit, 40, C₀ of {tokens} tokens of {source}"
            if key not in self.rows:
                memory = self.inject()
                spent, _ = timed(memory.fit_covariance, texts, tokens)
                self.write(memory, 40, 40, covariance=memory.covariance, targets=targets)
                self.keep(key, self.records[:40], spent.wall)
                memory.remove()

    def compare_solvers(self, targets: Any) -> None:
        """Score every solver for every number of facts, in one write and in several."""
        kinds: dict[str, dict[str, Any]] = {solver: {"solver": solver} for solver in self.arguments.solvers}
        for share in self.arguments.regularizations:
            kinds[f"memit with λ = {share} d_in"] = {"regularization": share}
        each = self.arguments.writes_of
        given = {"covariance": targets.covariance, "targets": targets}
        for count in self.arguments.records:
            for kind, settings in kinds.items():
                ways = {"one write": count}
                if 0 < each < count and kind in SOLVERS:
                    ways[f"writes of {each}"] = each
                for way, size in ways.items():
                    key = f"{kind}, {count} in {way}"
                    if key not in self.rows:
                        memory = self.inject(**settings)
                        spent, _ = timed(self.write, memory, count, size, **given)
                        first = min(100, count) if size < count else 0
                        self.keep(key, self.records[:count], spent.wall, first)
                        memory.remove()

    def write_as_the_authors(self, count: int, covariance: Covariance) -> None:
        """Score the first facts, written by whole passes one at a time."""
        key = f"MEMIT as its authors write it, {count}"
        if key in self.rows:
            return
        # Five blocks, 6 to 10 of SmolLM2-135M, and the λ of the rows that it was compared with.
        config = MemitConfig.reference(layers=(0.2, 0.35), regularization=0.5, seed=self.arguments.seed)
        config.layers = config.resolved(find_decoder(self.model))
        contexts = LedgerBuilder(self.model, self.tokenizer, config).contexts()
        plain = PlainMemit(self.model, self.tokenizer, config, covariance, contexts)
        facts = [record.fact for record in self.records[:count]]
        spent, found = timed(plain.write, facts, together=False)
        for layer, change in found.items():
            plain.projections[layer].weight.data += change
        self.keep(key, self.records[:count], spent.wall)
        for layer, change in found.items():
            plain.projections[layer].weight.data -= change

    def forget(self, number: int, targets: Any) -> None:
        """Forget facts drawn at random, and compare with a write of the others."""
        count = max(self.arguments.records)
        key = f"memit, {count} in one write, {number} forgotten"
        if key in self.rows:
            return
        drawn = set(random.Random(self.arguments.seed).sample(range(len(self.records)), number))
        forgotten, kept = ([r for i, r in enumerate(self.records) if (i in drawn) is own] for own in (True, False))
        given = {"covariance": targets.covariance, "targets": targets, "progress": False, "measure": False}
        alone = self.inject()
        alone.write([record.fact for record in kept], **given)
        expected = changes(alone)
        alone.remove()
        memory = self.inject()
        memory.write([record.fact for record in self.records], **given)
        spent, _ = timed(memory.forget, [record.fact for record in forgotten])
        off = max(float((own - expected[name]).norm() / expected[name].norm()) for name, own in changes(memory).items())
        gone = score_edits(self.model, self.tokenizer, forgotten)
        more: dict[str, Any] = {"exact match of the forgotten": gone.exact_match, "ΔW off a write of the others": off}
        self.keep(key, kept, spent.wall, **more, bytes=folder_sizes(memory))
        memory.remove()

    def read_slots(self) -> None:
        """Score memory slots, which read what a prompt names, on as many facts as edits."""
        for count in self.arguments.records:
            key = f"slots, {count} in one write"
            if key not in self.rows:
                memory: Any = inject_memory(self.model, MemorySlotsConfig(), tokenizer=self.tokenizer)
                facts = [record.fact for record in self.records[:count]]
                spent, _ = timed(memory.write, facts, progress=False, measure=False)
                self.keep(key, self.records[:count], spent.wall)
                memory.remove()


def changes(memory: Any) -> dict[str, Tensor]:
    """Return the change of each edited weight (hidden_size, d_in)."""
    modules: dict[str, Any] = {name: m for name, m in memory.model.named_modules() if isinstance(m, LoraLayer)}
    name = memory.adapter_name
    return {path: layer.get_delta_weight(name) for path, layer in modules.items() if name in layer.lora_A}


def folder_sizes(memory: Any) -> dict[str, int]:
    """Return the bytes of each file of a saved memory."""
    with tempfile.TemporaryDirectory() as folder:
        memory.save_pretrained(folder)
        return {path.name: path.stat().st_size for path in sorted(Path(folder).iterdir())}


def markdown(rows: dict[str, Any]) -> str:
    """Format the rows. Seconds are those of keys, solve and report (or of C₀), the targets being found before."""
    head = ["", "exact match", "ES", "PS", "NS", "S", "perplexity", "of the first 100: exact, S", "seconds"]
    base, lines = next(iter(rows.values()))["perplexity"], []
    for name, row in rows.items():
        first = row.get("first")
        cells = [
            name,
            *(f"{row[s]:.3f}" for s in SCORES),
            f"{row['perplexity']:.2f} ({row['perplexity'] / base - 1:+.2%})",
        ]
        cells += [f"{first['exact_match']:.3f}, {first['score']:.3f}" if first else "", f"{row['seconds']:.0f}"]
        lines.append(cells)
    return table(head, lines)


if __name__ == "__main__":
    main()
