"""Interrupts (Ctrl-C) whatever changes a model or a folder, at any line of the library, and looks at what is left.

    python -m tests.reliability.interrupting --points 200 --output docs/results/interruptions.json

The lines that an operation runs through are found first; then it is run again for each of them (or some, drawn at
random) in a fresh model, and interrupted just before that line. Lines that clean up after a failure (`except`,
`finally`, the head of a `with`) are left out: Python itself gives no such promise there.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers.utils import logging

import memory_adapters
from memory_adapters import (
    CovarianceFitter,
    inject_memory,
    load_adapters,
    load_memory,
    memories,
    merge_lora,
    save_adapters,
    use_adapters,
    use_adapters_by_row,
)
from memory_adapters.base_model.exclusive import _owners
from memory_adapters.files.atomic import OWN
from tests.reliability.operations import files_of
from tests.support.composing import KINDS, SUITES, put
from tests.support.contract import fingerprint, logits
from tests.support.models import byte_tokenizer, tiny_model

LIBRARY = str(Path(memory_adapters.__file__).parent)


@functools.cache
def cleaning(file: str) -> frozenset[int]:
    """Lines of a file that are run when something failed, or ended."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8"))):
        parts: list[ast.stmt] = []
        if isinstance(node, ast.Try):
            parts = [*node.finalbody, *(line for handler in node.handlers for line in handler.body)]
        if isinstance(node, ast.With):
            lines |= set(range(node.lineno, node.body[0].lineno))
        for part in parts:
            lines |= set(range(part.lineno, (part.end_lineno or part.lineno) + 1))
    return frozenset(lines)


def is_cleaning(frame: FrameType | None) -> bool:
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(LIBRARY) and frame.f_lineno in cleaning(file):
            return True
        frame = frame.f_back
    return False


class Tracer:
    """Counts the lines of the library that are run.

    Attributes:
        points: Line of the source to the counts at which it is run, without what cleans up (if `record`).
        place: The line at which it interrupted, once it has.
    """

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.count = stop, 0
        self.points: dict[str, list[int]] = {}
        self.place: str | None = None

    @contextmanager
    def over(self) -> Iterator[None]:
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(None)

    def _call(self, frame: FrameType, _event: str, _arg: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(LIBRARY) else None

    def _line(self, frame: FrameType, event: str, _arg: Any) -> Any:
        if event == "line":
            place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
            if self.stop is None and not is_cleaning(frame):
                self.points.setdefault(place, []).append(self.count)
            self.count += 1
            if self.count - 1 == self.stop:
                self.place = place
                raise KeyboardInterrupt
        return self._line


@dataclass
class Scene:
    """Where an operation takes place."""

    model: Any
    folder: Path
    memory: Any = None


@dataclass(frozen=True)
class Operation:
    """What is interrupted.

    Attributes:
        begin: Makes the scene.
        run: The operation.
    """

    begin: Callable[[Path], Scene]
    run: Callable[[Scene], object]


def on_model(*kinds: str) -> Callable[[Path], Scene]:
    """A model with adapters of these kinds; it is about the first."""

    def begin(folder: Path) -> Scene:
        model = tiny_model()
        found = {kind: put(model, kind, kind, seed) for seed, kind in enumerate(sorted(kinds))}  # the LoRA first
        return Scene(model, folder, found[kinds[0]] if kinds else None)

    return begin


def written(folder: Path) -> Scene:
    """A model with an edit that was written."""
    scene = Scene(tiny_model(), folder)
    scene.memory = inject_memory(scene.model, SUITES["memit"].make_config(), tokenizer=byte_tokenizer())
    SUITES["memit"].write(scene.memory)
    return scene


def within(context: Callable[[Scene], Any]) -> Callable[[Scene], None]:
    def run(scene: Scene) -> None:
        with context(scene):
            logits(scene.model)

    return run


def operations(saved: Path) -> dict[str, Operation]:
    """All of them by name; `saved` has a memory of each method, and all of them together in `all`."""
    tokenizer = byte_tokenizer()
    rows = ["__base__", *KINDS]
    found = {
        "load_adapters": Operation(on_model(), lambda s: load_adapters(s.model, saved / "all", tokenizer=tokenizer)),
        "merge_lora": Operation(on_model(*KINDS), lambda s: merge_lora(s.model, "lora")),
        "use_adapters": Operation(on_model(*KINDS), within(lambda s: use_adapters(s.model, ["memit", "lora"]))),
        "use_adapters_by_row": Operation(
            on_model(*KINDS[1:]),
            lambda s: _by_row(s, [name for name in rows if name != "lora"]),
        ),
        "forget": Operation(written, lambda s: s.memory.forget(s.memory.items[0])),
        "save_adapters": Operation(on_model(*KINDS), lambda s: save_adapters(s.model, s.folder / "files")),
        "fit a covariance": Operation(
            on_model(), lambda s: CovarianceFitter(s.model, tokenizer, [1, 2]).sample(300, progress=False)
        ),
    }
    for kind, suite in SUITES.items():
        others = [other for other in KINDS if other != kind]
        found |= {
            f"inject, {kind}": Operation(
                on_model(*others),
                lambda s, suite=suite: inject_memory(s.model, suite.make_config(), adapter_name="new"),
            ),
            f"load, {kind}": Operation(
                on_model(*others),
                lambda s, kind=kind: load_memory(s.model, saved / kind, tokenizer=tokenizer, adapter_name="new"),
            ),
            f"remove, {kind}": Operation(on_model(kind, *others), lambda s: s.memory.remove()),
            f"disabled, {kind}": Operation(on_model(kind, *others), within(lambda s: s.memory.disabled())),
            f"write, {kind}": Operation(on_model(kind, *others), lambda s, suite=suite: suite.write(s.memory)),
            f"save, {kind}": Operation(on_model(kind), lambda s: s.memory.save_pretrained(s.folder / "files")),
        }
    found["use"] = Operation(on_model("slots"), lambda s: s.memory.use(None))
    return found


def _by_row(scene: Scene, names: list[str]) -> None:
    with use_adapters_by_row(scene.model, names):
        logits(scene.model, *["The Eiffel Tower"] * len(names))


def save_each(folder: Path) -> None:
    model = tiny_model()
    for seed, kind in enumerate(KINDS):
        put(model, kind, kind, seed)
    save_adapters(model, folder / "all")
    for kind in SUITES:
        put(tiny_model(), kind, "knowledge", 1).save_pretrained(folder / kind)  # type: ignore[union-attr]


def state(scene: Scene) -> dict[str, Any]:
    """All that must be as it was: the model's structure, flags and answers, its memories and their books, files."""
    found: dict[str, Any] = {
        "structure": fingerprint(scene.model),
        "modes": [module.training for module in scene.model.modules()],
        "threads": len(_owners),
        "config": scene.model.config.to_dict(),
        "logits": logits(scene.model).tolist(),
        "weights": [parameter.double().sum().item() for parameter in scene.model.parameters()],
        "files": {name: data for name, data in files_of(scene.folder).items() if OWN in name or "README" not in name},
    }
    for name, memory in memories(scene.model).items():
        config = {key: value for key, value in memory.config.to_dict().items() if key not in ("writes", "answers")}
        numbers = {key: tensor.tolist() for key, tensor in memory.state_dict().items()}
        books = [memory.active, len(memory.config.writes), getattr(memory, "facts", None)]
        found[f"memory {name}"] = [config, numbers, *books, len(getattr(memory, "slots", []))]
    return found


def interrupted(operation: Operation, points: int | None, seed: int = 0) -> dict[str, Any]:
    """Interrupt an operation at so many places (all if None).

    Raises:
        AssertionError: If an interruption leaves something else than the state before or after, or the operation
            cannot be done afterwards.
    """
    with tempfile.TemporaryDirectory() as name:
        scene = operation.begin(Path(name))
        recorder = Tracer()
        with recorder.over():
            operation.run(scene)
        after = state(scene)
    marks = sorted({count for counts in recorder.points.values() for count in (counts[0], counts[-1])})
    if points is not None and points < len(marks):
        marks = sorted(random.Random(seed).sample(marks, points))
    outcomes: Counter[str] = Counter()
    for mark in marks:
        with tempfile.TemporaryDirectory() as name:
            scene = operation.begin(Path(name))
            before, tracer = state(scene), Tracer(mark)
            try:
                with tracer.over():
                    operation.run(scene)
            except KeyboardInterrupt:
                pass
            else:
                raise AssertionError(f"not interrupted at {tracer.place}")
            left = state(scene)
            if left == before:
                outcomes["as before"] += 1
                operation.run(scene)
                left = state(scene)
            else:
                outcomes["done"] += 1
            wrong = [key for key in left.keys() | after.keys() if left.get(key) != after.get(key)]
            assert not wrong, f"interrupted at {tracer.place}: {wrong}"
    return {"lines": len(recorder.points), "interruptions": len(marks), **outcomes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, help="places of each operation; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="operations whose names begin so")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        save_each(Path(name))
        for what, operation in operations(Path(name)).items():
            if not arguments.only or what.startswith(tuple(arguments.only)):
                found[what] = interrupted(operation, arguments.points, arguments.seed)
                print(what, json.dumps(found[what]), flush=True)
    total = Counter[str]()
    for row in found.values():
        total.update({key: value for key, value in row.items() if key != "lines"})
    result = {"about": {"torch": torch.__version__, "seed": arguments.seed}, "total": total, "operations": found}
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
