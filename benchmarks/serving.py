"""Load examples/serve.py: requests a second and latency beside the bare model, and whether requests are ever mixed up.

    python -m benchmarks.serving [--requests 16] [--rounds 10] [--mixed 10000] [--seconds 480]

*Speed*: two servers on this machine, one of the bare model, one with memory slots that hold 0, 10 and 1,000 things,
written through it. Eight clients each wait for their answer before they ask again. All are asked the same questions
about the ten things, in rounds that take turns; ratios are medians of those within a round. CPU time, the server's own,
hardly depends on what else the machine does.

*Mixed*: a small random model with eight memories, two of each method. Which memory a request names, and what it asks,
is drawn at random. Only questions are asked to which the answers, computed one at a time beforehand, differ between all
memories and from those to all other questions, so that no answer can be another's; and in which every token is further
ahead of the second-best than the rounding of a batch moves it, so that none changes by that. Meanwhile another client
adds to a ninth memory and forgets.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from transformers import AutoConfig

from benchmarks.common import (
    DEVICE,
    ROOT,
    BenchmarkParser,
    byte_tokenizer,
    dumps,
    random_model,
    save,
    table,
)
from memory_adapters import (
    Fact,
    GatedLoraConfig,
    MemitConfig,
    MemoryAdapterConfig,
    MemorySlotsConfig,
    inject_memory,
    use_adapters,
    use_adapters_by_row,
)
from memory_adapters.base_model.modes import computes_in_bfloat16

CLIENTS = 8
CHATS = "/v1/chat/completions"
ARMS = {  # server, memory
    "bare model": ("bare", None),
    "no memory named": ("memories", None),
    "0 things": ("memories", "none"),
    "10 things": ("memories", "ten"),
    "1,000 things": ("memories", "thousand"),
}
FIGURES = ("requests a second", "p50 seconds", "p95 seconds", "CPU seconds a request")
SYLLABLES = ("ba", "do", "fen", "gil", "hu", "ka", "lor", "mi", "nes", "pra", "sol", "tun", "va", "wex", "zi")
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
NAMES = ("Alpha", "Bravo", "Charlie", "Delta")
LEADS = ("", "Please: ", "Now, ", "Say it. ", "Listen: ", "I ask again. ", "Quick! ", "Well, ", "Sir, ", "Hello. ")
LEADS += ("So: ", "One more. ", "And ", "Good day. ", "Think. ", "Oh, ", "Tell me: ", "Next: ", "Look, ", "Right. ")
ASKED = (
    "The code of {} is",
    "What is the code of {}?",
    "Tell me of {}",
    "{} has a code",
    "Do you know {} and its code?",
)
WHOLE_ANSWER = 24  # tokens, in which an answer comes to the code; not timed
MOST_ASKED, MIXED_TOKENS = 24, 3
MARGIN = 0.01  # of logits
METHODS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "residual": (
        lambda: MemoryAdapterConfig(
            layers=[1, 2], memory_dim=32, token_gate="none", gate_init=1.0, num_prefixes=0, min_steps=0,
            num_train_epochs=60, learning_rate=1e-2,
        ),
        {"training_args": {"disable_tqdm": True}},
    ),
    "memit": (
        lambda: MemitConfig(
            layers=[1, 2], steps=40, clamp=5.0, weight_decay=0.0, kl_factor=0.0, learning_rate=0.5, num_prefixes=1,
            prefix_length=2, covariance_tokens=300,
        ),
        {},
    ),
    "gated_lora": (
        lambda: GatedLoraConfig(
            key_layer=1, lora_rank=4, num_train_epochs=30, steps_per_epoch=2, num_prefixes=1, learning_rate=1e-2
        ),
        {},
    ),
    "slots": (MemorySlotsConfig, {}),
}  # fmt: skip


def main() -> None:
    parser = BenchmarkParser(__doc__, "serving")
    parser.add_argument("--requests", type=int, default=16, quick=8, help="of each arm in each round")
    parser.add_argument("--rounds", type=int, default=10, quick=1)
    parser.add_argument("--things", type=int, default=1000, quick=12)
    parser.add_argument("--max-tokens", type=int, default=8, quick=2)
    parser.add_argument("--mixed", type=int, default=10_000, quick=60, help="requests that must not be mixed up")
    parser.add_argument("--mixed-clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=480, help="most of these")
    arguments = parser.parse()
    dtype = "bfloat16" if computes_in_bfloat16("bfloat16", torch.device(DEVICE)) else "float32"
    results: dict[str, Any] = {"speed": asyncio.run(speed(arguments, dtype))}
    about = dict(dtype=dtype, clients=CLIENTS, max_tokens=arguments.max_tokens, times="beside other processes")
    save(arguments, results, **about)
    print(speed_table(results["speed"]))
    with tempfile.TemporaryDirectory() as folder:
        expected, checked = prepared(Path(folder), arguments.seed)
        results["mixed"] = {**checked, **asyncio.run(mixed(arguments, Path(folder), expected))}
    save(arguments, results, **about)
    print(dumps(results["mixed"]))
    if results["mixed"]["wrong"]:
        sys.exit(f"{results['mixed']['wrong']} answers are not those of their memory.")


@asynccontextmanager
async def server(*options: str) -> AsyncIterator[tuple[httpx.AsyncClient, psutil.Process]]:
    """Run examples/serve.py in a process, and give a client of it, and the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "examples" / "serve.py"), "--port", str(port), *options]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        limits = httpx.Limits(max_connections=None)
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600, limits=limits) as client:
                while not await _is_up(client):
                    if process.poll() is not None:
                        log.seek(0)
                        raise RuntimeError(f"The server did not start:\n{log.read()}")
                    await asyncio.sleep(0.2)
                yield client, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait()


async def _is_up(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/health")).status_code == 200
    except httpx.TransportError:
        return False


async def speed(arguments: Any, dtype: str) -> dict[str, Any]:
    """Measure every arm in turn, in rounds of which every other goes backwards."""
    facts, model = things(arguments.things, arguments.seed), ["--model", arguments.model] if arguments.model else []
    counts = {"none": 0, "ten": 10, "thousand": arguments.things}
    options = ["--dtype", dtype, *model]
    memories = [option for name in counts for option in ("--memory", f"{name}=slots")]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    async with server(*options) as bare, server(*options, *memories) as with_memories:
        servers = {"bare": bare, "memories": with_memories}
        written = {}
        for name, count in counts.items():
            if count:
                start, items = time.perf_counter(), [vars_of(fact) for fact in facts[:count]]
                (await with_memories[0].post(f"/memories/{name}/items", json={"items": items})).raise_for_status()
                written[f"{count} things"] = time.perf_counter() - start
        for place, memory in ARMS.values():  # warm up
            await asked_by_all(servers[place], facts, memory, CLIENTS, arguments.max_tokens)
        for number in range(arguments.rounds):
            for name in reversed(ARMS) if number % 2 else ARMS:
                place, memory = ARMS[name]
                found[name].append(
                    await asked_by_all(servers[place], facts, memory, arguments.requests, arguments.max_tokens)
                )
        whole = {
            name: (await asked_by_all(servers[place], facts, memory, 10, WHOLE_ANSWER))["right"]
            for name, (place, memory) in ARMS.items()
        }
    arms = {name: {**own, "answers with the code": whole[name]} for name, own in summary(found).items()}
    return {"write_seconds": written, "arms": arms}


def things(count: int, seed: int) -> list[Fact]:
    """Make facts about things that do not exist."""
    draw = random.Random(seed)
    names = ["".join(parts).capitalize() for parts in product(SYLLABLES, repeat=3)]
    return [
        Fact("The code of the safe in Hotel {} is", f"Hotel {name}", str(draw.randrange(1000, 9999)))
        for name in draw.sample(names, count)
    ]


def vars_of(fact: Fact) -> dict[str, str]:
    return {"prompt": fact.prompt, "subject": fact.subject, "target": fact.target}


async def asked_by_all(
    server: tuple[httpx.AsyncClient, psutil.Process],
    facts: Sequence[Fact],
    memory: str | None,
    count: int,
    max_tokens: int,
) -> dict[str, float]:
    """Ask about the first ten things with `CLIENTS` clients at once."""
    (client, process), waiting = server, iter(range(count))
    latencies: list[float] = []
    right = 0

    async def ask_on() -> None:
        nonlocal right
        for number in waiting:
            fact = facts[number % 10]
            messages = [{"role": "user", "content": f"What is the code of the safe in {fact.subject}?"}]
            start = time.perf_counter()
            body = {"messages": messages, "max_tokens": max_tokens, "memory": memory}
            answer = await client.post(CHATS, json=body)
            latencies.append(time.perf_counter() - start)
            right += fact.target in answer.raise_for_status().json()["choices"][0]["message"]["content"]

    start, before = time.perf_counter(), process.cpu_times()
    await asyncio.gather(*(ask_on() for _ in range(CLIENTS)))
    seconds, now = time.perf_counter() - start, process.cpu_times()
    cuts = statistics.quantiles(latencies, n=20, method="inclusive")
    return {
        "requests a second": count / seconds,
        "p50 seconds": cuts[9],
        "p95 seconds": cuts[18],
        "CPU seconds a request": (now.user + now.system - before.user - before.system) / count,
        "right": right / count,
    }


def summary(found: Mapping[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Take, for each arm, the medians over rounds of its figures, and of these ÷ the bare model's of the same round."""
    arms: dict[str, dict[str, float]] = {}
    for name, rounds in found.items():
        own = arms[name] = {}
        for figure in FIGURES:
            values = [one[figure] for one in rounds]
            ratios = [one / bare[figure] for one, bare in zip(values, found["bare model"], strict=True)]
            own |= {figure: statistics.median(values), f"{figure} ÷ bare": statistics.median(ratios)}
    return arms


def speed_table(speed: Mapping[str, Any]) -> str:
    rows = [
        [
            name,
            *(f"{own[figure]:.2f} ({own[f'{figure} ÷ bare']:.2f})" for figure in FIGURES),
            f"{own['answers with the code']:.0%}",
        ]
        for name, own in speed["arms"].items()
    ]
    return table(["", *(f"{figure} (÷ bare)" for figure in FIGURES), "answers with the code"], rows)


def prepared(folder: Path, seed: int) -> tuple[dict[tuple[str, str | None], str], dict[str, Any]]:
    """Save a random model with memories, and return the questions to ask, and the answers that are expected.

    Returns:
        The answer of each question with each memory, or none; and what was checked of them.
    """
    sizes = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    sizes |= dict(vocab_size=260, intermediate_size=48, max_position_embeddings=512)
    model, tokenizer = random_model(AutoConfig.for_model("llama", **sizes), seed, std=0.3), byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    codes = iter("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
    names: list[str | None] = [None]
    for method, (config, options) in METHODS.items():
        for number in (1, 2):
            names.append(name := f"{method}-{number}")
            memory = inject_memory(model, config(), tokenizer=tokenizer, adapter_name=name)
            facts = [Fact("The code of {} is", thing, 3 * next(codes)) for thing in NAMES]
            memory.write(facts, progress=False, measure=False, **options)
            memory.save_pretrained(folder / "memories" / name)
            memory.active = False
    expected: dict[tuple[str, str | None], str] = {}
    first: dict[tuple[str, str | None], torch.Tensor] = {}
    margins = []
    for asked in questions():
        own = {name: _answer(model, tokenizer, asked, name) for name in names}
        least = min(margin for _, _, margin in own.values())
        texts = {text for text, _, _ in own.values()}
        if least >= MARGIN and len(texts) == len(own) and not texts & set(expected.values()):
            expected |= {(asked, name): text for name, (text, _, _) in own.items()}
            first |= {(asked, name): logits for name, (_, logits, _) in own.items()}
            margins.append(least)
        if len(margins) == MOST_ASKED:
            break
    assert len(set(expected.values())) == len(expected) >= 3 * len(names), "too few answers differ"
    moved = max(_moved(model, tokenizer, list(first.items()), seed))
    assert moved < MARGIN / 10, f"in a batch logits move by {moved}"
    return expected, {
        "memories": len(names) - 1,
        "questions": len(margins),
        "different answers": len(expected),
        "least margin of logits": min(margins),
        "most that a batch moves logits": moved,
    }


def questions() -> Iterator[str]:
    every = [lead + asked.format(name) for name, lead, asked in product(NAMES, LEADS, ASKED)]
    yield from random.Random(0).sample(every, len(every))


def _encoded(tokenizer: Any, asked: Sequence[str]) -> Any:
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": one}], tokenize=False, add_generation_prompt=True)
        for one in asked
    ]
    options = dict(add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    return tokenizer(texts, **options).to(DEVICE)


def _answer(model: Any, tokenizer: Any, asked: str, name: str | None) -> tuple[str, torch.Tensor, float]:
    """Return an answer, the logits of its first token, and how far ahead of the second-best its tokens are at least."""
    inputs = _encoded(tokenizer, [asked])
    with use_adapters(model, [name] if name else []):
        found = model.generate(
            **inputs, max_new_tokens=MIXED_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    best = torch.cat(found.logits).topk(2).values
    ids = found.sequences[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True), found.logits[0][0], float((best[:, 0] - best[:, 1]).min())


@torch.no_grad()
def _moved(model: Any, tokenizer: Any, pairs: list[tuple[tuple[str, str | None], torch.Tensor]], seed: int) -> Any:
    """Yield by how much the logits differ in batches of requests drawn at random."""
    random.Random(seed).shuffle(pairs)
    for start in range(0, len(pairs), 16):
        batch = pairs[start : start + 16]
        inputs = _encoded(tokenizer, [asked for (asked, _), _ in batch])
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with use_adapters_by_row(model, [name or "__base__" for (_, name), _ in batch]):
            logits = model(**inputs, position_ids=positions).logits[:, -1]
        yield float((logits - torch.stack([alone for _, alone in batch])).abs().max())


async def mixed(arguments: Any, folder: Path, expected: Mapping[tuple[str, str | None], str]) -> dict[str, Any]:
    """Ask at random, every tenth as a stream, and count the answers that are not those expected."""
    names = sorted({name for _, name in expected if name})
    memories = [option for name in names for option in ("--memory", f"{name}={name.partition('-')[0]}")]
    options = ["--model", str(folder / "model"), "--folder", str(folder / "memories"), "--batch-size", "16"]
    draw, pairs, started = random.Random(arguments.seed), sorted(expected, key=str), 0.0
    counts = {"requests": 0, "streamed": 0, "wrong": 0, "of another": 0, "changes of another memory": 0}
    others, working = set(expected.values()), True

    async with server(*options, *memories, "--memory", "scratch=slots") as (client, _):
        started = time.perf_counter()

        async def ask_on() -> None:
            while counts["requests"] < arguments.mixed and time.perf_counter() - started < arguments.seconds:
                counts["requests"] += 1
                (asked, name), streamed = draw.choice(pairs), counts["requests"] % 10 == 0
                messages = [{"role": "user", "content": asked}]
                body = {"messages": messages, "max_tokens": MIXED_TOKENS, "memory": name, "stream": streamed}
                text = _text(await client.post(CHATS, json=body), streamed)
                counts["streamed"] += streamed
                if text != expected[asked, name]:
                    counts["wrong"] += 1
                    counts["of another"] += text in others

        async def change_on() -> None:
            place = "/memories/scratch/items"
            while working:
                code = f"The code of {draw.choice(NAMES)} is {draw.randrange(1000)}."
                (await client.post(place, json={"items": [code]})).raise_for_status()
                await asyncio.sleep(0.2)
                (await client.delete(f"{place}/0")).raise_for_status()
                counts["changes of another memory"] += 2

        changing = asyncio.create_task(change_on())
        await asyncio.gather(*(ask_on() for _ in range(arguments.mixed_clients)))
        working, seconds = False, time.perf_counter() - started
        await changing
        batches = (await client.get("/health")).json()["batches"]
    return {**counts, "batches": batches, "requests a batch": counts["requests"] / batches, "seconds": seconds}


def _text(response: httpx.Response, streamed: bool) -> str:
    response.raise_for_status()
    if not streamed:
        return response.json()["choices"][0]["message"]["content"]
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events[-1] == "[DONE]", events[-1]
    return "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1])


if __name__ == "__main__":
    main()
