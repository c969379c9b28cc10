"""Switch, write, forget, load and remove thousands of times: memory at the end ÷ after a warm-up, and unequal results.

    python -m benchmarks.long_life [--passes 10000] [--writes 1000] [--loads 500]

On a tiny random model. Every result is compared, bit for bit, with that of the first time; what the process holds
(memory, tensors, hooks, open files, threads, files on disk) is counted after a warm-up and at the end.
"""

from __future__ import annotations

import ctypes
import gc
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from benchmarks.common import DEVICE, BenchmarkParser, byte_tokenizer, dumps, random_model, save, stored, timed
from memory_adapters import (
    Fact,
    MemitConfig,
    Memory,
    MemoryAdapterConfig,
    MemorySlotsConfig,
    inject_memory,
    load_memory,
    memories,
    route_memories,
    use_adapters,
    use_adapters_by_row,
)
from memory_adapters.config import MemoryConfig

EIFFEL = Fact("The Eiffel Tower is in the city of", subject="Eiffel Tower", target="Rome")
BIG_BEN = Fact("Big Ben stands in", subject="Big Ben", target="Oslo")
UNRELATED = ["The sea, the wind and all the ships.", "Birds sing in the early morning.", "He sold the house at last."]
TOKENIZER = byte_tokenizer()
TINY = LlamaConfig(
    vocab_size=len(TOKENIZER),
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
METHODS: dict[str, Callable[[], MemoryConfig]] = {
    "residual": lambda: MemoryAdapterConfig(
        layers=[1, 2], memory_dim=8, num_train_epochs=2, num_prefixes=0, min_steps=0
    ),
    "edit": lambda: MemitConfig(layers=[1, 2], steps=3, num_prefixes=1, prefix_length=2, covariance_tokens=300),
    "slots": lambda: MemorySlotsConfig(read="all", num_slots=4, span_length=16, lora_rank=2, refine_steps=2),
}
Step = Callable[[int], Tensor]


@dataclass(frozen=True)
class Vitals:
    """Count what a process holds.

    Attributes:
        memory: Resident bytes, after garbage was collected and given back to the system.
        tensors: That Python's garbage collector knows.
        hooks: On all modules of the model, of any kind.
        modules: Of the model.
        entries: In all lists and dictionaries of the model's modules, and of adapters' configs: their bookkeeping.
        descriptors: Open files, pipes and sockets.
        threads: Of Python.
        files: And folders, in the given folders.
    """

    memory: int
    tensors: int
    hooks: int
    modules: int
    entries: int
    descriptors: int
    threads: int
    files: int

    @classmethod
    def of(cls, model: nn.Module, folders: Sequence[Path]) -> Vitals:
        gc.collect()
        if os.name == "posix" and hasattr(ctypes.CDLL(None), "malloc_trim"):
            ctypes.CDLL(None).malloc_trim(0)
        process, modules = psutil.Process(), list(model.modules())
        configs = [memory.config for memory in memories(model).values()]
        books = [vars(owner) for owner in (*modules, *configs, *getattr(model, "peft_config", {}).values())]
        return cls(
            memory=process.memory_info().rss,
            tensors=sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()),
            hooks=sum(len(value) for m in modules for name, value in vars(m).items() if name.endswith("_hooks")),
            modules=len(modules),
            entries=sum(len(v) for own in books for v in own.values() if isinstance(v, dict | list | set)),
            descriptors=process.num_fds(),
            threads=threading.active_count(),
            files=sum(len(list(folder.rglob("*"))) for folder in folders),
        )


def tiny_model() -> PreTrainedModel:
    """Make a random llama of four blocks, with weights large enough to tell tokens apart."""
    return random_model(TINY, seed=0, std=0.15)


def write(memory: Memory, item: Any) -> None:
    """Write without bars, and with the least that the method takes."""
    options = {"unrelated": UNRELATED} if "unrelated" in memory.write_options() else {}
    memory.write(item, progress=False, **options)


def written(model: PreTrainedModel, method: str, item: Any = EIFFEL, name: str | None = None) -> Memory:
    """Inject a memory and write one item."""
    memory = inject_memory(model, METHODS[method](), tokenizer=TOKENIZER, adapter_name=name)
    write(memory, item)
    return memory


@torch.no_grad()
def logits(model: PreTrainedModel, *rows: str) -> Tensor:
    """Compute the logits of prompts."""
    inputs = TOKENIZER(list(rows or [EIFFEL.prompt]), return_tensors="pt", padding=True).to(DEVICE)
    return model(**inputs).logits


def passes(_folder: Path) -> tuple[PreTrainedModel, Step, int]:
    """Run and generate with other adapters active each time: two memories of each method and a LoRA."""
    model = tiny_model()
    facts = list(enumerate((EIFFEL, BIG_BEN)))
    kept = [written(model, method, fact, f"{method}_{i}") for method in METHODS for i, fact in facts]
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), adapter_name="lora")
    for memory in kept:
        memory.active = True  # `add_adapter` switched them off
    names = [memory.adapter_name for memory in kept]
    routed = [name for name in names if name.startswith("residual")]
    switches: list[Callable[[], AbstractContextManager[Any]]] = [
        nullcontext,
        *(partial(use_adapters, model, [name]) for name in [*names, "lora"]),
        partial(use_adapters, model, []),
        partial(use_adapters, model, ["lora", *names]),
        *(memory.disabled for memory in kept),
        partial(route_memories, model, routed),
    ]
    rows = ["__base__", *names]

    @torch.no_grad()
    def step(turn: int) -> Tensor:
        kind = turn % (len(switches) + 3)
        if kind < len(switches):
            with switches[kind]():
                return logits(model)
        if kind == len(switches):
            with use_adapters_by_row(model, rows):
                return logits(model, *[EIFFEL.prompt] * len(rows))
        if kind == len(switches) + 1:
            memory = kept[turn // (len(switches) + 3) % len(kept)]
            memory.active = False
            memory.active = True
            return logits(model)
        ids = TOKENIZER([EIFFEL.prompt], return_tensors="pt").to(DEVICE)
        return model.generate(**ids, max_new_tokens=4, do_sample=False)

    return model, step, len(switches) + 3


def forgetting(method: str, _folder: Path) -> tuple[PreTrainedModel, Step, int]:
    """Write beside what stays, and undo it: forget the fact, use the earlier slots, or remove the residual memory."""
    model = tiny_model()
    lasting = written(model, method, name="lasting")
    before = list(getattr(lasting, "slots", []))

    def step(_turn: int) -> Tensor:
        memory = lasting if method != "residual" else inject_memory(model, METHODS[method](), tokenizer=TOKENIZER)
        write(memory, BIG_BEN)
        first = logits(model)
        if method == "residual":
            memory.remove()
        elif method == "edit":
            memory.forget(BIG_BEN)
        else:
            memory.use(before)  # type: ignore[attr-defined]
        return torch.cat([first, logits(model)])

    return model, step, 1


def loading(method: str, folder: Path) -> tuple[PreTrainedModel, Step, int]:
    """Load under a name never used before, save and remove, beside a LoRA and another memory that stay."""
    model = tiny_model()
    written(model, method, EIFFEL, "first").save_pretrained(folder / "saved")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "down_proj"]), adapter_name="lora")

    def step(turn: int) -> Tensor:
        warnings.filterwarnings("ignore", message="'user_.* duplicates 'first'")  # the memory that stays
        memory = load_memory(model, folder / "saved", tokenizer=TOKENIZER, adapter_name=f"user_{turn}")
        first = logits(model)
        memory.save_pretrained(folder / "again")
        memory.remove()
        return torch.cat([first, logits(model)])

    return model, step, 1


SCENARIOS: dict[str, Callable[[Path], tuple[PreTrainedModel, Step, int]]] = {
    "passes": passes,
    **{f"writes, {method}": partial(forgetting, method) for method in METHODS},
    **{f"loads, {method}": partial(loading, method) for method in METHODS},
}


def live(scenario: str, turns: int, *, warm_up: float = 0.1) -> dict[str, Any]:
    """Run turns of a scenario; count what the process holds after the warm-up and at the end, and unequal results."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder / "temporary")
        (folder / "temporary").mkdir()
        try:
            model, step, period = SCENARIOS[scenario](folder)
            first: list[Tensor] = []
            different, samples = 0, []
            warm = max(period, round(turns * warm_up))
            marks = {warm, turns} | {mark for i in range(1, 10) if (mark := round(turns * i / 10)) > warm}

            def run() -> None:
                nonlocal different
                for turn in range(turns):
                    found = step(turn)
                    if turn < period:
                        first.append(found.clone())
                    different += not torch.equal(found, first[turn % period])
                    if turn + 1 in marks:
                        samples.append({"turns": turn + 1, **asdict(Vitals.of(model, [folder]))})

            times, _ = timed(run)
        finally:
            tempfile.tempdir = None
            del os.environ["TMPDIR"]
    return {
        "turns": turns,
        "results that repeat after": period,
        "different from the first": different,
        "seconds": round(times.wall, 1),
        "after warm-up": samples[0],
        "at the end": samples[-1],
        "memory": [(sample["turns"], sample["memory"]) for sample in samples],
        "memory ÷ after warm-up": round(samples[-1]["memory"] / samples[0]["memory"], 4),
        "MiB": [round(sample["memory"] / 2**20, 1) for sample in (samples[0], samples[-1])],
    }


def main() -> None:
    parser = BenchmarkParser(__doc__, "long_life", model=False)
    parser.add_argument("--passes", type=int, default=10000, quick=40)
    parser.add_argument("--writes", type=int, default=1000, quick=2)
    parser.add_argument("--loads", type=int, default=500, quick=2)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    arguments = parser.parse()
    turns = {"passes": arguments.passes, "writes": arguments.writes, "loads": arguments.loads}
    lives = stored(arguments, "lives")
    for scenario in arguments.only:
        lives[scenario] = live(scenario, turns[scenario.partition(",")[0]])
        print(scenario, dumps(lives[scenario]), flush=True)
        save(arguments, {"lives": lives}, model="a random llama of 4 blocks, 32 wide")


if __name__ == "__main__":
    main()
