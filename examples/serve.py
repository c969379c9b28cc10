"""Serve one model with memories over HTTP: chat with any of them, and add and forget what they know meanwhile.

    pip install -e ".[serving]"
    python examples/serve.py --memory notes=slots --memory facts=memit [--folder memories] [--model HUB_ID_OR_PATH]

Each `--memory NAME=METHOD` is a memory of the model. With `--folder` it is loaded from there if it was saved before,
and saved there after each change. A request names the memory that it uses, or none.

One thread has the model, the tokenizer and the memories (model_thread.py), and does one thing at a time: a change of a
memory, or a batch of the chats that wait, in which each row uses the memory that its request names.
`use_adapters_by_row` does that for all four methods: edits, residual memories, gated LoRAs, and memory slots, where
each row reads the entries that its own prompt asks for. (`SlotMemory.use([a, b])` gives rows other slots of one memory,
and is not needed here.) Where `write(compress=True)` kept a part of an entry's keys and values, a row of such a batch
reads the entry's whole text.

Answers are greedy, and sent as they come. A batch ends with its last answer; requests that come meanwhile wait. Nobody
is asked for a password: it listens on this machine alone, unless `--host` says otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from queue import Full
from typing import Any, Literal, TypeVar
from uuid import uuid4

import torch
import uvicorn
from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as AnyHTTPException
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.model_thread import Change, Chat, ModelThread
from memory_adapters import inject_memory, load_memory
from memory_adapters.embedded_model import embedded_model
from memory_adapters.registry import methods

STATUS = {Full: 503, NotImplementedError: 501, RequestValidationError: 400, ValueError: 400, TypeError: 400}
T = TypeVar("T")
routes = APIRouter()


class Message(BaseModel):
    """A message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(BaseModel):
    """What is asked: a subset of OpenAI's chat completions, and `memory`."""

    model_config = ConfigDict(extra="forbid")  # what would be ignored, such as a temperature, is an error
    messages: list[Message] = Field(min_length=1)
    max_tokens: int = Field(128, ge=1)
    stream: bool = False
    memory: str | None = None
    model: str | None = None  # clients send it; there is only one


class NewItems(BaseModel):
    """Items to write: texts, and dictionaries with the fields of an item."""

    model_config = ConfigDict(extra="forbid")
    items: list[str | dict[str, Any]] = Field(min_length=1)


@routes.get("/health")
async def health(request: Request) -> Response:
    thread: ModelThread = request.app.state.thread
    counts = {name: len(items) for name, items in thread.items.items()}
    state = {"alive": thread.is_alive(), "waiting": len(thread.waiting), "batches": thread.batches, "items": counts}
    return JSONResponse(state, 200 if state["alive"] else 503)


@routes.get("/memories/{name}/items")
async def items(name: str, request: Request) -> dict[str, Any]:
    return {"items": written(name, request)}


@routes.post("/memories/{name}/items")
async def add(name: str, new: NewItems, request: Request) -> dict[str, Any]:
    written(name, request)
    return await changed(request, lambda thread: thread.write(name, new.items))


@routes.delete("/memories/{name}/items/{i}")
async def forget(name: str, i: int, request: Request) -> dict[str, Any]:
    if not 0 <= i < len(known := written(name, request)):
        raise HTTPException(404, f"The memory {name!r} has no item {i}: it has {len(known)}.")
    item = known[i]  # chosen now, because changes that wait may move it
    return await changed(request, lambda thread: thread.forget(name, item))


@routes.post("/v1/chat/completions")
async def chat(body: ChatRequest, request: Request) -> Any:
    if body.memory is not None:
        written(body.memory, request)
    loop, parts = asyncio.get_running_loop(), asyncio.Queue[str | Exception | None]()
    messages = [message.model_dump() for message in body.messages]
    asked = Chat(body.memory, messages, body.max_tokens, lambda part: loop.call_soon_threadsafe(parts.put_nowait, part))
    request.app.state.thread.put(asked)
    texts = texts_of(asked, parts)
    about = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": body.model or "memory-adapters"}
    if body.stream:
        first = await unless_gone(request, anext(texts, ""))  # an error before it has a status of its own
        return StreamingResponse(events(about, asked, first, texts), media_type="text/event-stream")
    text = "".join(await unless_gone(request, collected(texts)))
    prompt, said = len(asked.prompt), len(asked.said)
    message = {"role": "assistant", "content": text}
    return {
        **about,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": asked.finish_reason}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said},
    }


def written(name: str, request: Request) -> list[Any]:
    """Return what is written in a memory."""
    known: dict[str, list[Any]] = request.app.state.thread.items
    if name not in known:
        raise HTTPException(404, f"There is no memory {name!r}; there are {sorted(known)}.")
    return known[name]


async def changed(request: Request, call: Callable[[ModelThread], Any]) -> Any:
    """Let the thread change a memory, and return what came of it."""
    thread: ModelThread = request.app.state.thread
    change = Change(lambda: call(thread))
    thread.put(change)
    return await asyncio.wrap_future(change.result)


async def texts_of(asked: Chat, parts: asyncio.Queue[str | Exception | None]) -> AsyncIterator[str]:
    """Yield the texts of an answer; a reader that stops early cancels it."""
    try:
        while (part := await parts.get()) is not None:
            if isinstance(part, Exception):
                raise part
            yield part
    finally:
        asked.cancelled = True


async def collected(texts: AsyncIterator[str]) -> list[str]:
    """Return the texts of an answer."""
    return [text async for text in texts]


async def unless_gone(request: Request, wanted: Awaitable[T]) -> T:
    """Wait for something, unless the client goes away before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(wanted), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise HTTPException(499, "The client has gone.")
    finally:
        for task in tasks:
            task.cancel()


async def events(about: dict[str, Any], asked: Chat, first: str, texts: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yield the events of a streamed answer."""

    def event(delta: dict[str, str]) -> str:
        choices = [{"index": 0, "delta": delta, "finish_reason": None if delta else asked.finish_reason}]
        return f"data: {json.dumps({**about, 'object': 'chat.completion.chunk', 'choices': choices})}\n\n"

    yield event({"role": "assistant", "content": first})
    try:
        async for text in texts:
            yield event({"content": text})
    except Exception as error:
        yield f"data: {json.dumps(described(error))}\n\n"
    else:
        yield event({})
        yield "data: [DONE]\n\n"


def described(error: Exception) -> dict[str, Any]:
    """Return an error as JSON."""
    message = error.detail if isinstance(error, AnyHTTPException) else str(error)
    if isinstance(error, RequestValidationError):
        found = [(".".join(map(str, one["loc"][1:])), one["msg"]) for one in error.errors()]
        message = "; ".join(f"{f'`{where}`' if where else 'the body'}: {what}" for where, what in found)
    return {"error": {"message": message, "type": type(error).__name__}}


async def as_json(_request: Request, error: Exception) -> Response:
    """Answer with an error's message."""
    found = [status for kind, status in STATUS.items() if isinstance(error, kind)]
    return JSONResponse(described(error), error.status_code if isinstance(error, AnyHTTPException) else found[0])


async def failed(_request: Request, error: Exception) -> Response:
    """Answer with the message of an error that nobody expects; the server logs it."""
    return JSONResponse(described(error), 500)


def create_app(thread: ModelThread) -> FastAPI:
    """Make the application; its thread begins and ends with it."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        thread.start()
        yield
        await asyncio.to_thread(thread.close)

    handlers: dict[Any, Any] = {AnyHTTPException: as_json, Exception: failed, **dict.fromkeys(STATUS, as_json)}
    app = FastAPI(title="memory-adapters", lifespan=lifespan, exception_handlers=handlers)
    app.state.thread = thread
    app.include_router(routes)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hub id or path; by default the embedded model")
    parser.add_argument("--memory", action="append", default=[], metavar="NAME=METHOD", help=", ".join(methods()))
    parser.add_argument("--folder", type=Path, help="where memories are loaded from, and saved after each change")
    parser.add_argument("--dtype", default="auto", help="of the model: auto, float32, bfloat16, float16")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--batch-size", type=int, default=8, help="most chats that are answered at once")
    parser.add_argument("--queue-size", type=int, default=64, help="most requests that wait; others get 503")
    arguments = parser.parse_args()
    name = arguments.model or embedded_model()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=arguments.dtype, device_map=device)
    tokenizer, memories = AutoTokenizer.from_pretrained(name), {}
    for named in arguments.memory:
        own, _, method = named.partition("=")
        if method not in methods():
            parser.error(f"--memory {named}: write NAME=METHOD, with one of {', '.join(methods())}.")
        if arguments.folder and (arguments.folder / own).exists():
            memories[own] = load_memory(model, arguments.folder / own, tokenizer=tokenizer, adapter_name=own)
        else:
            config = methods()[method].config_class()
            memories[own] = inject_memory(model, config, tokenizer=tokenizer, adapter_name=own)
        memories[own].active = False  # each request says what it uses
    thread = ModelThread(
        model.eval(),
        tokenizer,
        memories,
        folder=arguments.folder,
        batch_size=arguments.batch_size,
        queue_size=arguments.queue_size,
    )
    uvicorn.run(create_app(thread), host=arguments.host, port=arguments.port)


if __name__ == "__main__":
    main()
