"""One thread that has a model and its memories to itself: it changes memories, and answers chats in batches."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from queue import Full
from threading import Condition, Thread
from typing import Any

import torch
from transformers import StoppingCriteria

from memory_adapters import Memory, use_adapters_by_row

__all__ = ["Change", "Chat", "ModelThread"]

GATHER_SECONDS = 0.01  # that the first chat of a batch waits for others


@dataclass(eq=False)
class Chat:
    """Store a request for an answer; `send` is given its texts as they come, and None or an error at the end."""

    memory: str | None
    messages: list[dict[str, str]]
    max_tokens: int
    send: Callable[[str | Exception | None], object]
    cancelled: bool = False
    prompt: list[int] = field(default_factory=list)
    said: list[int] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(eq=False)
class Change:
    """Store a change of a memory, and what came of it."""

    call: Callable[[], Any]
    result: Future[Any] = field(default_factory=Future)


class ModelThread(Thread):
    """Have a model and its memories to itself: make the changes, and answer the chats, that wait in a queue.

    Attributes:
        items: What is written in each memory, by its name, as of the last change.
        waiting: The queue; `queue_size` changes and chats at most.
        batches: How many batches of chats there were.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        memories: Mapping[str, Memory[Any]],
        *,
        folder: Path | None = None,
        batch_size: int = 8,
        queue_size: int = 64,
    ) -> None:
        super().__init__(name="model", daemon=True)
        if not tokenizer.chat_template:
            raise ValueError("`tokenizer` has no chat template: give that of a model that chats.")
        self.model, self.tokenizer, self.memories, self.folder = model, tokenizer, memories, folder
        self.batch_size, self.queue_size = batch_size, queue_size
        self.items = {name: list(memory.config.items) for name, memory in memories.items()}
        self.waiting: deque[Chat | Change] = deque()
        self.batches, self.closed, self._changed = 0, False, Condition()
        # `generate` gives the head a slice, for which PyTorch on a CPU copies frozen bfloat16 weights once a row.
        model.get_output_embeddings().register_forward_pre_hook(lambda _head, given: (given[0].contiguous(),))
        ends = model.generation_config.eos_token_id
        self.ends = set(ends) if isinstance(ends, list) else {ends}

    def put(self, job: Chat | Change) -> None:
        """Let a job wait for its turn."""
        with self._changed:
            if self.closed or len(self.waiting) >= self.queue_size:
                raise Full(f"{len(self.waiting)} requests are waiting already: try again later.")
            self.waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """End after the batch in progress."""
        with self._changed:
            self.closed = True
            self._changed.notify()
        self.join()

    def write(self, name: str, items: list[Any]) -> dict[str, Any]:
        """Write items into a memory; it is told what came of it."""
        report = self.memories[name].write(items, progress=False, measure=False)
        self._keep(name)
        return {"written": sum(report.num_items.values()), "notes": report.notes, "seconds": report.seconds}

    def forget(self, name: str, item: Any) -> dict[str, Any]:
        """Forget an item of a memory."""
        self.memories[name].forget(item)
        self._keep(name)
        return {"forgotten": item}

    def _keep(self, name: str) -> None:
        self.items[name] = list(self.memories[name].config.items)
        if self.folder is not None:
            self.memories[name].save_pretrained(self.folder / name)

    def run(self) -> None:
        """Work until it is closed."""
        while jobs := self._next():
            if isinstance(change := jobs[0], Change):
                if change.result.set_running_or_notify_cancel():
                    try:
                        change.result.set_result(change.call())
                    except Exception as error:
                        change.result.set_exception(error)
            else:
                self._answer([chat for chat in jobs if isinstance(chat, Chat) and self._prepare(chat)])

    def _next(self) -> list[Chat | Change]:
        """Return the next change by itself, or the next chats; nothing when it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self.waiting or self.closed)
            if self.waiting and isinstance(self.waiting[0], Chat):
                self._changed.wait_for(lambda: len(self.waiting) >= self.batch_size or self.closed, GATHER_SECONDS)
            if self.closed:
                return []
            jobs = [self.waiting.popleft()]
            while isinstance(jobs[0], Chat) and self.waiting and len(jobs) < self.batch_size:
                if isinstance(self.waiting[0], Change):  # what was asked before a change is answered before it
                    break
                jobs.append(self.waiting.popleft())
            return jobs

    def _prepare(self, chat: Chat) -> bool:
        """Tokenise a chat, and return whether it is to be answered."""
        if chat.cancelled:
            return False
        try:
            text = self.tokenizer.apply_chat_template(chat.messages, tokenize=False, add_generation_prompt=True)
            chat.prompt = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception as error:  # a template is a program, and refuses what it does not take in any way
            chat.send(ValueError(f"`messages` do not fit the model's chat template: {error}"))
            return False
        limit = self.model.config.get_text_config().max_position_embeddings
        if len(chat.prompt) + chat.max_tokens > limit:
            found = f"`messages` have {len(chat.prompt)} tokens, which with `max_tokens={chat.max_tokens}`"
            chat.send(ValueError(f"{found} exceed the model's {limit}: shorten them."))
            return False
        return True

    def _answer(self, chats: Sequence[Chat]) -> None:
        """Answer chats in one batch; if that fails, those that have got nothing are asked one by one."""
        if not chats:
            return
        self.batches += 1
        width, device = max(len(chat.prompt) for chat in chats), self.model.device
        pads = [[0] * (width - len(chat.prompt)) for chat in chats]
        ids = torch.tensor([pad + chat.prompt for pad, chat in zip(pads, chats, strict=True)], device=device)
        mask = torch.tensor(
            [pad + [1] * len(chat.prompt) for pad, chat in zip(pads, chats, strict=True)], device=device
        )
        try:
            with use_adapters_by_row(self.model, [chat.memory or "__base__" for chat in chats]):
                self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=max(chat.max_tokens for chat in chats),
                    do_sample=False,
                    num_beams=1,
                    pad_token_id=0,
                    stopping_criteria=[_Sent(chats, self.tokenizer, self.ends)],
                )
        except Exception as error:
            logging.getLogger("uvicorn.error").exception("A batch of %d failed.", len(chats))
            for chat in chats:
                if len(chats) > 1 and not chat.said:
                    self._answer([chat])
                elif chat.finish_reason is None:
                    chat.send(error)


class _Sent(StoppingCriteria):
    """Send each row of a batch its new text, and end the rows that have all of theirs."""

    def __init__(self, chats: Sequence[Chat], tokenizer: Any, ends: set[Any]) -> None:
        self.chats, self.tokenizer, self.ends = chats, tokenizer, ends
        self.sent = [""] * len(chats)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self.chats[row].finish_reason is None:
                self._add(row, token)
        done = [chat.finish_reason is not None or chat.cancelled for chat in self.chats]
        return torch.tensor(done, device=input_ids.device)

    def _add(self, row: int, token: int) -> None:
        chat = self.chats[row]
        if token in self.ends:
            chat.finish_reason = "stop"
        else:
            chat.said.append(token)
            chat.finish_reason = "length" if len(chat.said) == chat.max_tokens else None
        text = self.tokenizer.decode(chat.said, skip_special_tokens=True)
        if chat.finish_reason or not text.endswith("\ufffd"):  # half of a character waits for the rest
            chat.send(text[len(self.sent[row]) :])
            self.sent[row] = text
        if chat.finish_reason:
            chat.send(None)
