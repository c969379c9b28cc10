"""Measure what knowledge in a model costs: time to write and to forget, memory, bytes on disk, slower passes.

Times are taken on this machine and in this process, so they compare methods, not machines. Beside wall time there is
the CPU time of all threads, which other work on the machine disturbs less.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.decoder import execution_device, find_decoder
from memory_adapters.base_model.modes import evaluating
from memory_adapters.base_model.tokens import tokenize
from memory_adapters.evaluation.comparison.baselines import AppliedBaseline, Baseline
from memory_adapters.evaluation.scores.generation import NEUTRAL
from memory_adapters.items import Fact, Item

__all__ = [
    "Costs",
    "Speed",
    "applied_at_cost",
    "bytes_on_disk",
    "memory_rise",
    "seconds_to_forget",
    "slowdown",
    "speed_prompt",
    "speeds",
]

PROMPT_TOKENS = 128
DECODED_TOKENS = 16
DECODING_FROM = 8  # tokens of the prompt: the time is that of decoding
ROUNDS = 9
SAMPLING_SECONDS = 0.02
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None


@dataclass(frozen=True)
class Costs:
    """Store what a baseline costs; None is what was not measured.

    Attributes:
        seconds: Wall time to put it on the model, with whatever that needs (covariances, prefixes, copies of weights).
        cpu_seconds: CPU time of the same.
        peak_memory: Most bytes that this took beyond what was in use: on CUDA those of PyTorch's tensors; on a CPU the
            rise of the process's resident set, a lower bound, as memory that was freed but kept is used again.
        bytes_on_disk: Size of all files that have to be kept.
        prefill: Time of a forward pass over 128 tokens ÷ its time without the knowledge.
        decode: Time of decoding 16 tokens ÷ its time without.
        forget_seconds: Wall time to take one fact out; None also where the rest has to be written again.
    """

    seconds: float
    cpu_seconds: float
    peak_memory: int
    bytes_on_disk: int | None = None
    prefill: float | None = None
    decode: float | None = None
    forget_seconds: float | None = None


class Speed(NamedTuple):
    """Store median seconds of a pass over a prompt and of decoding: CPU time, or wall time on an accelerator."""

    prefill: float
    decode: float


@contextmanager
def applied_at_cost(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, baseline: Baseline, items: Sequence[Item]
) -> Iterator[tuple[AppliedBaseline, Costs]]:
    """Apply a baseline as `baseline.applied`, and measure what that costs."""
    device = _device(model)
    with ExitStack() as stack:
        with memory_rise(device) as rise:
            wall, cpu = time.perf_counter(), time.process_time()
            applied = stack.enter_context(baseline.applied(model, tokenizer, items))
            _synchronize(device)
            costs = Costs(time.perf_counter() - wall, time.process_time() - cpu, rise())
        yield applied, costs


@contextmanager
def memory_rise(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the most bytes that were in use so far, beyond those in use at the start.

    On CUDA they are PyTorch's allocations on `device`; else the process's resident set, sampled every 20 ms.
    """
    gc.collect()
    if _malloc_trim is not None:
        _malloc_trim(0)  # freed memory that glibc keeps would hide a rise
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    process, done = psutil.Process(), threading.Event()
    before = most = process.memory_info().rss

    def look() -> int:
        nonlocal most
        most = max(most, process.memory_info().rss)
        return most - before

    def sample() -> None:
        while not done.wait(SAMPLING_SECONDS):
            look()

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield look
    finally:
        done.set()
        sampler.join()


def speed_prompt(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """Return 128 tokens of `texts`, again from the start if they have fewer."""
    return list(islice(cycle(chain.from_iterable(tokenize(tokenizer, text) for text in texts)), PROMPT_TOKENS))


def speeds(
    model: PreTrainedModel, ids: Sequence[int], states: Sequence[Callable[[], AbstractContextManager[Any]]]
) -> list[Speed]:
    """Time a model in each of several states, in turns within this process.

    Args:
        model: A causal LM.
        ids: Tokens of the prompt; decoding starts from the first 8.
        states: Contexts in which the model is timed; `nullcontext` for the model as it stands.
    """
    device = _device(model)
    prompt = torch.tensor([list(ids)], device=device)
    start = prompt[:, :DECODING_FROM]
    decoding = {**NEUTRAL, "do_sample": False, "max_new_tokens": DECODED_TOKENS, "min_new_tokens": DECODED_TOKENS}

    def prefill() -> None:
        model(input_ids=prompt, use_cache=True)

    def decode() -> None:
        mask = torch.ones_like(start)
        model.generate(  # type: ignore[operator]  # PreTrainedModel is no GenerationMixin
            input_ids=start, attention_mask=mask, pad_token_id=0, **decoding
        )

    times: list[list[Speed]] = [[] for _ in states]
    with torch.no_grad(), evaluating(model):
        for turn in range(ROUNDS + 1):  # the first warms up
            for state, taken in zip(states, times, strict=True):
                with state():
                    both = Speed(_seconds(prefill, device), _seconds(decode, device))
                if turn:
                    taken.append(both)
    return [Speed(*map(statistics.median, zip(*taken, strict=True))) for taken in times]


def slowdown(model: PreTrainedModel, ids: Sequence[int], applied: AppliedBaseline, before: Speed) -> Speed:
    """Return the times with a baseline ÷ without it.

    Both are taken in turns if it can be switched off. If not, as with all weights, the time without it is `before`,
    which was taken in this process before the baseline was applied.
    """
    if applied.disabled is None:
        own, without = *speeds(model, ids, [nullcontext]), before
    else:
        own, without = speeds(model, ids, [nullcontext, applied.disabled])
    return Speed(own.prefill / without.prefill, own.decode / without.decode)


def bytes_on_disk(applied: AppliedBaseline) -> int:
    """Return the size of all files that `applied.save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        applied.save(Path(folder))
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def seconds_to_forget(applied: AppliedBaseline, fact: Fact) -> float | None:
    """Take `fact` out and return the wall time; None if the rest would have to be written again."""
    if applied.forget is None:
        return None
    start = time.perf_counter()
    try:
        applied.forget(fact)
    except NotImplementedError:
        return None
    return time.perf_counter() - start


def _seconds(job: Callable[[], None], device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    job()
    _synchronize(device)
    return clock() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _device(model: PreTrainedModel) -> torch.device:
    return execution_device(find_decoder(model).embeddings)
