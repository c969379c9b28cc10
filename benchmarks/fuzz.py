"""Altered files by the hundred thousand: each must load, or be refused by an error that names it, within bounds.

    python -m benchmarks.fuzz [--examples 100000] [--seed 0] [--output docs/results/fuzz.json]
    python -m benchmarks.fuzz --guided 100000   # needs `pip install ".[fuzz]"`

Configs, safetensors headers, ledgers, slots, covariances, indices and items of a small model are altered one at a time
(`tests/alterations.py`), and read under a watch (`tests/watch.py`): no import, no code, no pickle, no process, no file
outside of the folder, at most 1 s of processor time and 64 MiB (20 times as much where a model is loaded into), and
what `tests/watch.py` allows for each byte of the file. With `--guided` atheris chooses which files are altered further:
those that reached lines of the readers that none had.
Run it from the root of a checkout. Ends with exit code 1 if anything else happened; such files are kept.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging

MOST_MEMORY = 8 << 30
WHOLE_SHARE = 0.02  # of the examples are loaded into a model
OUTCOMES = ("the same", "another, valid", "ValueError", "OSError", "other")


class Table:
    """Outcomes by target.

    Attributes:
        counts: Target to outcome to number of files.
        others: What else happened, with the file that it happened to.
    """

    def __init__(self, kept: Path) -> None:
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.others: list[dict[str, str]] = []
        self.kept = kept
        self.start = time.time()

    def add(self, reader: Any, watch: Any, name: str, file: str, data: bytes) -> None:
        """Read one altered file of a target, and count what happened."""
        with reader.altered(name, file, data):
            try:
                outcome = reader.outcome(name, watch)
            except Exception as error:
                outcome = "other"
                place = self.kept / f"{len(self.others)}-{Path(file).name}"
                place.write_bytes(data)
                self.others.append(
                    {"target": name, "file": str(place), "error": f"{type(error).__name__}: {error}"[:500]}
                )
                print(f"{name}, {file}: {self.others[-1]['error']}", file=sys.stderr)
        self.counts[name][outcome] += 1

    def report(self, output: Path | None, **about: Any) -> int:
        """Print and save the table; the exit code."""
        rows = {
            name: {outcome: counts[outcome] for outcome in OUTCOMES} for name, counts in sorted(self.counts.items())
        }
        total = {outcome: sum(row[outcome] for row in rows.values()) for outcome in OUTCOMES}
        print("| read | files | " + " | ".join(OUTCOMES) + " |\n|---|---|" + "---|" * len(OUTCOMES))
        for name, row in [*rows.items(), ("all", total)]:
            print(
                f"| {name} | {sum(row.values()):,} | " + " | ".join(f"{row[outcome]:,}" for outcome in OUTCOMES) + " |"
            )
        result = {
            **about,
            "seconds": round(time.time() - self.start),
            "total": total,
            "targets": rows,
            "others": self.others,
        }
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return 1 if self.others else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--guided", type=int, metavar="RUNS", help="let atheris choose the bytes of so many files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))  # so that more is an error of one file
    logging.disable_progress_bar()
    if args.guided:
        import atheris

        with atheris.instrument_imports(include=GUIDED, enable_loader_override=False):
            from tests.support import hostile
    else:
        from tests.support import hostile
    from tests.support.alterations import altered_file
    from tests.support.watch import Watch

    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if os.access(memory, os.W_OK) else None))
    reader, watch = hostile.Reader(folder), Watch()
    gc.collect()
    gc.freeze()  # what is there already is not looked through again, within the second that a file has
    table = Table(Path(tempfile.mkdtemp(prefix="fuzz-kept-")))
    parts = [name for name, target in reader.targets.items() if not target.whole]
    whole = [name for name, target in reader.targets.items() if target.whole]

    def finish(**about: Any) -> None:
        code = table.report(args.output, **about, seed=args.seed)
        shutil.rmtree(folder)
        sys.stdout.flush()
        os._exit(code)  # libFuzzer knows no other end

    if args.guided:
        corpus = Path(tempfile.mkdtemp(prefix="fuzz-corpus-"))
        for number, name in enumerate(parts):
            for which, file in enumerate(reader.targets[name].files):
                (corpus / f"{number}-{which}").write_bytes(bytes([number, which]) + reader.originals[name][file])

        def place(data: bytes) -> tuple[str, str]:
            name = parts[data[0] % len(parts)]
            files = reader.targets[name].files
            return name, files[data[1] % len(files)]

        def mutate(data: bytes, size: int, seed: int) -> bytes:
            choose = random.Random(seed)
            if len(data) > 2 and choose.random() < 0.5:
                with suppress(Exception):  # it is no longer such a file
                    return (data[:2] + altered_file(place(data)[1], data[2:], choose))[:size]
            return atheris.Mutate(data, size)

        def read(data: bytes) -> None:
            if len(data) > 2:
                table.add(reader, watch, *place(data), data[2:])
            if sum(sum(counts.values()) for counts in table.counts.values()) >= args.guided:
                finish(guided=args.guided)

        options = [
            f"-seed={args.seed + 1}",
            f"-runs={10 * args.guided}",
            "-max_len=65536",
            "-len_control=0",
            "-verbosity=0",
        ]
        atheris.Setup([sys.argv[0], *options, str(corpus)], read, custom_mutator=mutate)
        atheris.Fuzz()
    for number in tqdm(range(args.examples), unit="file", smoothing=0, mininterval=10):
        choose = random.Random(f"{args.seed} {number}")
        name = choose.choice(whole if choose.random() < WHOLE_SHARE else parts)
        file = choose.choice(reader.targets[name].files)
        table.add(reader, watch, name, file, altered_file(file, reader.originals[name][file], choose))
    finish(examples=args.examples)


GUIDED = [
    f"memory_adapters.{name}" for name in ("reading", "config", "inject", "collection", "knowledge", "peft_files")
]

if __name__ == "__main__":
    main()
