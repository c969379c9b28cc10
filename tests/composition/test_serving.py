"""The recipes of docs/serving.md for threads, asyncio and streaming, as they stand there."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_adapters import use_adapters
from memory_adapters.base_model.exclusive import _turns
from tests.support.composing import put
from tests.support.contract import PROMPT, encode, logits
from tests.support.models import byte_tokenizer, tiny_model

SETTINGS: dict[str, Any] = dict(max_new_tokens=6, do_sample=False)
NAMES = ("residual", "memit", "slots")


@pytest.fixture
def recipes() -> dict[str, Any]:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    found: dict[str, Any] = {"model": tiny_model(), "tokenizer": byte_tokenizer()}
    for seed, name in enumerate(NAMES):
        put(found["model"], name, name, seed)
    for block in re.findall(r"```python\n(.*?)```", text.partition("## Threads, asyncio and streaming")[2], re.DOTALL):
        exec(block, found)
    return found


def wanted(model: Any, name: str) -> torch.Tensor:
    with use_adapters(model, [name]):
        return model.generate(**encode(PROMPT), **SETTINGS)


def text_of(ids: torch.Tensor) -> str:
    return byte_tokenizer().decode(ids[0, encode(PROMPT)["input_ids"].shape[1] :])


async def collected(stream: Any) -> str:
    return "".join([text async for text in stream])


def test_requests_queue(recipes: dict[str, Any]) -> None:
    model = recipes["model"]
    on, expected = logits(model), {name: wanted(model, name) for name in NAMES}
    names = NAMES * 4

    async def serve() -> list[torch.Tensor]:
        return await asyncio.gather(*[recipes["answer"]([name], **encode(PROMPT), **SETTINGS) for name in names])

    with ThreadPoolExecutor(4) as pool:
        in_threads = pool.map(lambda name: recipes["answer_in_a_thread"]([name], **encode(PROMPT), **SETTINGS), names)
    for got in (asyncio.run(serve()), in_threads):
        for ids, name in zip(got, names, strict=True):
            assert torch.equal(ids, expected[name])
    assert torch.equal(logits(model), on)
    assert not _turns


def test_streams(recipes: dict[str, Any]) -> None:
    model = recipes["model"]
    on, expected = logits(model), {name: text_of(wanted(model, name)) for name in NAMES}
    for name in NAMES:
        assert "".join(recipes["stream"]([name], **encode(PROMPT), **SETTINGS)) == expected[name]

    async def serve() -> list[str]:
        streams = [recipes["stream_in_a_task"]([name], **encode(PROMPT), **SETTINGS) for name in NAMES]
        return await asyncio.gather(*map(collected, streams))

    assert asyncio.run(serve()) == list(expected.values())
    assert torch.equal(logits(model), on)
    assert not _turns


STREAMS: dict[str, Callable[[dict[str, Any], Any], Any]] = {
    "thread": lambda recipes, criteria: "".join(
        recipes["stream"](["memit"], **encode(PROMPT), **SETTINGS, stopping_criteria=criteria)
    ),
    "task": lambda recipes, criteria: asyncio.run(
        collected(recipes["stream_in_a_task"](["memit"], **encode(PROMPT), **SETTINGS, stopping_criteria=criteria))
    ),
}


@pytest.mark.timeout(50)  # the streamer's own limit is 60 seconds
@pytest.mark.parametrize("kind", STREAMS)
def test_an_error_in_the_thread_reaches_the_reader(kind: str, recipes: dict[str, Any]) -> None:
    def fail(ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        if ids.shape[1] > 24:
            raise KeyError("in the thread")
        return torch.zeros(len(ids), dtype=torch.bool)

    on = logits(recipes["model"])
    with pytest.raises(KeyError, match="in the thread"):
        STREAMS[kind](recipes, [fail])
    assert torch.equal(logits(recipes["model"]), on)
    assert not _turns


def test_a_reader_that_stops_leaves_the_model_as_it_was(recipes: dict[str, Any]) -> None:
    model = recipes["model"]
    on = logits(model)
    stream = recipes["stream"](["residual"], **encode(PROMPT), **SETTINGS)
    next(stream)
    stream.close()
    assert torch.equal(logits(model), on)
    assert not _turns
