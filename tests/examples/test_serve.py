"""The example server: memories beside each other in one batch, streams, changes while it serves, and its errors."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from memory_adapters import GatedLoraConfig, Memory, MemorySlotsConfig, inject_memory, load_memory, use_adapters
from tests.gated_lora.test_contract import UNRELATED
from tests.support.composing import SUITES
from tests.support.models import byte_tokenizer, tiny_model

# The lowest versions are tested without a server.
httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

from examples.model_thread import Chat, ModelThread  # noqa: E402
from examples.serve import create_app  # noqa: E402

FACT = {"prompt": "The Eiffel Tower is in the city of", "subject": "Eiffel Tower", "target": "Rome"}
QUESTIONS = ("Where is the Eiffel Tower?", "Say something.", "The Eiffel Tower is in the city of")
TOKENS = 6
CHATS = "/v1/chat/completions"
Test = Callable[[Any, ModelThread, Callable[[], Awaitable[None]]], Awaitable[None]]


def memories_on(model: Any, *methods: str) -> dict[str, Memory[Any]]:
    """Inject and write memories, which are inactive afterwards."""
    configs = {name: suite.make_config for name, suite in SUITES.items()}
    configs |= {"slots": MemorySlotsConfig, "lora": lambda: GatedLoraConfig(key_layer=1, num_train_epochs=2)}
    options: dict[str, Any] = {"residual": dict(unrelated=UNRELATED, training_args={"disable_tqdm": True})}
    options["lora"] = dict(unrelated=UNRELATED)
    found = {}
    for name in methods:
        memory = inject_memory(model, configs[name](), tokenizer=byte_tokenizer(chat=True), adapter_name=name)
        memory.write(FACT, progress=False, measure=False, **options.get(name, {}))
        if name == "residual":  # so few steps teach it nothing: let it act everywhere
            SUITES[name].fill(memory)
        memory.active = False
        found[name] = memory
    return found


def thread_with(*methods: str, **settings: Any) -> ModelThread:
    model: Any = tiny_model()
    return ModelThread(model, byte_tokenizer(chat=True), memories_on(model, *methods), **settings)


def served(thread: ModelThread, test: Test) -> None:
    """Run a test with a client; the server begins to work when the test calls its third argument."""

    async def run() -> None:
        app = create_app(thread)
        begun = asyncio.Event()
        ended = asyncio.Event()

        async def work() -> None:
            await begun.wait()
            async with app.router.lifespan_context(app):
                await ended.wait()

        async def begin() -> None:
            begun.set()

        working = asyncio.create_task(work())
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            try:
                await test(client, thread, begin)
            finally:
                begun.set()
                ended.set()
                await working

    asyncio.run(run())


def asked(question: str, memory: str | None = None, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], "max_tokens": TOKENS, "memory": memory, **more}


async def waiting(thread: ModelThread, count: int) -> None:
    while len(thread.waiting) < count:
        await asyncio.sleep(0.001)


async def all_at_once(client: Any, thread: ModelThread, begin: Any, requests: list[dict[str, Any]]) -> list[Any]:
    """Send requests that all wait when the server begins."""
    sent = [asyncio.create_task(client.post(CHATS, json=one)) for one in requests]
    await waiting(thread, len(sent))
    await begin()
    return await asyncio.gather(*sent)


def text_of(response: Any) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


@torch.no_grad()
def ids_alone(thread: ModelThread, question: str, memory: str | None) -> list[int]:
    """The answer of the model by itself."""
    tokenizer = byte_tokenizer(chat=True)
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    with use_adapters(thread.model, [memory] if memory else []):
        ids = thread.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def alone(thread: ModelThread, question: str, memory: str | None) -> str:
    return byte_tokenizer().decode(ids_alone(thread, question, memory), skip_special_tokens=True)


def test_rows_of_one_batch_use_the_memories_that_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    thread = thread_with("memit", "residual", "slots", "lora", batch_size=16)
    names = [None, "memit", "residual", "slots", "lora"]
    requests = [(question, name) for question in QUESTIONS for name in names]
    wanted = [alone(thread, *request) for request in requests]
    assert len(set(wanted[:5])) == 5  # each memory's own
    batches: list[int] = []
    answer = thread._answer
    monkeypatch.setattr(thread, "_answer", lambda chats: (batches.append(len(chats)), answer(chats)))

    async def test(client: Any, thread: ModelThread, begin: Any) -> None:
        found = await all_at_once(client, thread, begin, [asked(*request) for request in requests])
        assert [text_of(one) for one in found] == wanted
        usage = found[0].json()["usage"]
        assert usage["completion_tokens"] == TOKENS
        assert found[0].json()["choices"][0]["finish_reason"] == "length"

    served(thread, test)
    assert batches == [15]


def test_a_stream_gives_the_same_text_and_ends_with_its_own_row() -> None:
    thread = thread_with("slots")
    wanted = alone(thread, QUESTIONS[0], "slots")
    thread.ends = {ids_alone(thread, QUESTIONS[1], None)[0]}

    async def test(client: Any, thread: ModelThread, begin: Any) -> None:
        streamed = asked(QUESTIONS[0], "slots", stream=True)
        one, stopped = await all_at_once(client, thread, begin, [streamed, asked(QUESTIONS[1])])
        assert stopped.json()["choices"][0] | {"message": {}} == {"index": 0, "message": {}, "finish_reason": "stop"}
        assert text_of(stopped) == ""
        assert one.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in one.text.split("\n\n") if line]
        assert events.pop() == "[DONE]"
        choices = [json.loads(event)["choices"][0] for event in events]
        assert "".join(choice["delta"].get("content", "") for choice in choices) == wanted
        assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]

    served(thread, test)


def test_items_are_added_and_forgotten_between_answers(tmp_path: Path) -> None:
    thread = thread_with("slots", folder=tmp_path)
    model: Any = tiny_model()
    base, taught = (alone(thread, QUESTIONS[0], name) for name in (None, "slots"))
    assert base != taught

    async def test(client: Any, thread: ModelThread, begin: Any) -> None:
        await begin()
        place = "/memories/slots/items"
        ask = asked(QUESTIONS[0], "slots")
        assert (await client.get(place)).json() == {"items": [FACT]}
        added = await client.post(place, json={"items": ["The code of the door is 7351.", {**FACT, "subject": "city"}]})
        assert added.status_code == 200
        assert added.json()["written"] == 2
        assert load_memory(model, tmp_path / "slots").config.items == thread.items["slots"]
        # In their order: an answer, a change, an answer.
        sent = [client.post(CHATS, json=ask), client.delete(f"{place}/0"), client.get(place)]
        before, forgotten, _ = await asyncio.gather(*sent)
        assert text_of(before) == taught
        assert forgotten.json() == {"forgotten": FACT}
        assert len((await client.get(place)).json()["items"]) == 2
        for _ in range(2):
            assert (await client.delete(f"{place}/0")).status_code == 200
        assert text_of(await client.post(CHATS, json=ask)) == base
        health = (await client.get("/health")).json()
        assert health == {"alive": True, "waiting": 0, "batches": 2, "items": {"slots": 0}}

    served(thread, test)


def test_a_full_queue_refuses_and_a_cancelled_request_is_dropped() -> None:
    thread = thread_with("slots", queue_size=2)
    answered: list[list[str]] = []
    answer = thread._answer
    thread._answer = lambda chats: (answered.append([c.messages[0]["content"] for c in chats]), answer(chats))  # type: ignore

    async def test(client: Any, thread: ModelThread, begin: Any) -> None:
        sent = []
        for count, question in enumerate(QUESTIONS[:2], 1):
            sent.append(asyncio.create_task(client.post(CHATS, json=asked(question))))
            await waiting(thread, count)
        for refused in (
            await client.post(CHATS, json=asked("One more")),
            await client.post("/memories/slots/items", json={"items": ["One more."]}),
        ):
            assert refused.status_code == 503
            assert refused.json()["error"]["message"] == "2 requests are waiting already: try again later."
        sent[0].cancel()
        await asyncio.wait([sent[0]])
        await begin()
        assert text_of(await sent[1]) == alone(thread_with("slots"), QUESTIONS[1], None)

    served(thread, test)
    assert answered == [[QUESTIONS[1]]]


def test_errors_are_json_and_those_beside_them_are_answered() -> None:
    thread = thread_with("slots", "residual")

    async def test(client: Any, thread: ModelThread, begin: Any) -> None:
        long, fine, streamed = await all_at_once(
            client, thread, begin, [asked("long " * 200), asked(QUESTIONS[1]), asked("long " * 200, stream=True)]
        )
        assert text_of(fine)
        for refused in (long, streamed):
            assert refused.status_code == 400
            assert "exceed the model's 512" in refused.json()["error"]["message"]
        items = "/memories/slots/items"
        for status, message, method, place, body in (
            (404, "no memory 'other'; there are ['residual', 'slots']", "POST", CHATS, asked("x", "other")),
            (400, "`max_tokens`: Input should be greater", "POST", CHATS, asked("x", max_tokens=0)),
            (400, "`temperature`: Extra inputs", "POST", CHATS, asked("x", temperature=1.0)),
            (400, "`messages`: List should have", "POST", CHATS, {"messages": []}),
            (400, "the body: Input should be a valid dict", "POST", CHATS, "{"),
            (400, "an item has the fields", "POST", items, {"items": [{"prompt": "x"}]}),
            (404, "has no item 1: it has 1", "DELETE", f"{items}/1", None),
            (501, "cannot forget single items", "DELETE", "/memories/residual/items/0", None),
            (404, "Not Found", "GET", "/nothing", None),
        ):
            found = await client.request(method, place, json=body)
            assert found.status_code == status, found.text
            assert message in found.json()["error"]["message"]

    served(thread, test)


def test_a_batch_that_fails_is_asked_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    thread = thread_with("slots")
    generate, bad_token = thread.model.generate, thread.tokenizer("!")["input_ids"][0]

    def failing(**given: Any) -> Any:
        if len(given["input_ids"]) > 1 or (given["input_ids"] == bad_token).any():
            raise RuntimeError("out of memory")
        return generate(**given)

    monkeypatch.setattr(thread.model, "generate", failing)

    async def test(client: Any, thread: ModelThread, begin: Any) -> None:
        bad, fine = await all_at_once(client, thread, begin, [asked("!"), asked(QUESTIONS[1])])
        assert (bad.status_code, bad.json()["error"]["message"]) == (500, "out of memory")
        assert text_of(fine)

    served(thread, test)


def test_a_tokenizer_without_a_chat_template_is_refused() -> None:
    with pytest.raises(ValueError, match="`tokenizer` has no chat template"):
        ModelThread(tiny_model(), byte_tokenizer(), {})


@pytest.fixture
def address() -> Iterator[tuple[str, ModelThread]]:
    """The address of a server in a thread, and its model's thread."""
    thread = thread_with("slots")
    server = uvicorn.Server(uvicorn.Config(create_app(thread), port=0, log_level="warning"))
    running = Thread(target=server.run)
    running.start()
    while not server.started:
        time.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()
    yield f"http://{host}:{port}", thread
    server.should_exit = True
    running.join()


@pytest.mark.integration
@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_away_ends_its_answer(streamed: bool, address: tuple[str, ModelThread]) -> None:
    url, thread = address
    wanted = alone(thread, QUESTIONS[1], None)
    answered: list[Chat] = []
    answer = thread._answer
    thread._answer = lambda chats: (answered.extend(chats), answer(chats))  # type: ignore
    request = asked(QUESTIONS[0], "slots", stream=streamed, max_tokens=400)
    with httpx.Client(base_url=url, timeout=60 if streamed else 0.2) as client:
        if streamed:
            with client.stream("POST", CHATS, json=request) as response:
                assert '"role": "assistant"' in next(response.iter_lines())
                assert len(answered[0].said) < 400  # it came while the rest was made
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(CHATS, json=request)
    with httpx.Client(base_url=url, timeout=60) as client:
        assert text_of(client.post(CHATS, json=asked(QUESTIONS[1]))) == wanted
    assert answered[0].cancelled
    assert answered[0].finish_reason is None
    assert len(answered[0].said) < 400
