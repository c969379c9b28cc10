"""Kills processes in the middle of what they save, fit, train, write, push and load, and says what is left.

    python -m tests.reliability --output docs/results/kills.json
    python -m tests.reliability --every 4 --random 0         # every fourth call once, and nothing at random

Every operation is killed once before each call that changes a file (or before every n-th), in the middle of its files,
and then at random times. A loopback Hub is in this process, all else in one of which the children are forked.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MEMORY = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None  # a kill does not wait for a disk
SIZES = (200, 900, 3000)  # bytes after which a file breaks off


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--random", type=int, default=140, help="kills at random times, in all")
    parser.add_argument("--every", type=int, default=1, help="kill before every n-th call alone")
    parser.add_argument("--only", nargs="*", default=[], help="operations by name, such as Save Upload")
    parser.add_argument("--seed", type=int, default=0, help="of the random times")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument(
        "--folder", type=Path, default=MEMORY, help="where to work; by default in memory, if there is such"
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    from tests.support.hub import HubServer

    with HubServer() as server, tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        worker = run_worker(server, Path(folder), *sys.argv[1:])
    sys.exit(worker.returncode)


def run_worker(server: Any, folder: Path, *arguments: str, **settings: Any) -> subprocess.CompletedProcess[Any]:
    """Run the process that children are forked from, in an empty folder, as a client of a loopback Hub."""
    (folder / "tmp").mkdir()
    environment = server.client_environment(folder / "home") | {"TMPDIR": f"{folder}/tmp", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["MEMORY_ADAPTERS_CACHE"] = f"{folder}/cache"  # has the locks
    command = [sys.executable, "-m", "tests.reliability", *arguments, "--worker", str(folder)]
    return subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, check=False, **settings)


def work(arguments: argparse.Namespace) -> None:
    """In the process that children are forked from."""
    import torch
    from transformers.utils import logging

    from tests.reliability.killing import AtCall, AtTime, InFile, Kill, killed, measured
    from tests.reliability.operations import Operation
    from tests.reliability.work import EVERY

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    root = arguments.worker / "work"
    root.mkdir()
    rng = random.Random(arguments.seed)
    start = time.perf_counter()
    rows: dict[str, dict[str, Any]] = {}

    def strike(operation: Operation, kill: Kill, kind: str) -> None:
        operation.begin()
        row = rows[type(operation).__name__]
        row["kills"][kind] += 1
        row["in the middle"] += killed(operation.run, kill)
        row["outcomes"][operation.after()] += 1

    operations = [kind(root) for kind in EVERY if not arguments.only or kind.__name__ in arguments.only]
    for operation in operations:
        operation.begin()
        calls, seconds = measured(operation.run, arguments.worker)
        row = {"operation": operation.name, "calls": calls, "seconds": round(seconds, 2)}
        rows[type(operation).__name__] = row | {"kills": Counter(), "in the middle": 0, "outcomes": Counter()}
        operation.after()
        for number in range(0, calls, arguments.every):
            strike(operation, AtCall(number, arguments.worker), "before a call")
        for size in SIZES[:: arguments.every]:
            strike(operation, InFile(size), "in a file")
        print(json.dumps(rows[type(operation).__name__]), flush=True)
    for operation in turns(operations, arguments.random):
        seconds = rows[type(operation).__name__]["seconds"]
        strike(operation, AtTime(seconds, rng), "at a random time")
    total = {
        "kills": sum(sum(row["kills"].values()) for row in rows.values()),
        "in the middle": sum(row["in the middle"] for row in rows.values()),
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(total), flush=True)
    for row in rows.values():
        row["all kills"] = sum(row["kills"].values())
    if arguments.output:
        arguments.output.write_text(json.dumps({"total": total, "operations": list(rows.values())}, indent=1) + "\n")


def turns(operations: list[Any], count: int) -> Iterator[Any]:
    """So many operations, each in turn."""
    for number in range(max(count, 0)):
        yield operations[number % len(operations)]


if __name__ == "__main__":
    main()
