"""Facts as rows of tokens, and batches of rows that keep what their targets cannot change.

Of a row, only the tokens from the subject's last one on depend on what is done there. The keys and values of all
tokens before are computed once and kept. A model with linear attention or convolutions keeps a state instead, from
which several tokens at once cannot go on: there whole rows are read each time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.chat import rendered_question
from memory_adapters.base_model.decoder import attention_window, execution_device
from memory_adapters.base_model.partial_forward import CACHE, keeps_keys_alone, positioned
from memory_adapters.base_model.tokens import continued_prompt, last_token_of, shared_length, tokenize
from memory_adapters.items import Fact

__all__ = [
    "Context",
    "FactRow",
    "PrefixCache",
    "RowBatch",
    "bare_rows",
    "chat_context",
    "context_rows",
    "row_batches",
    "subject_rows",
]


@dataclass(frozen=True)
class Context:
    """Store what stands around a prompt.

    Attributes:
        before: Text before it.
        after: Text between it and the target; None for the space, if any, that joins the two.
    """

    before: str = ""
    after: str | None = None


@dataclass(frozen=True)
class FactRow:
    """Store one fact in one context.

    Attributes:
        fact: Index of the fact; where targets are found, of its subject.
        context: Index of the context; -1 for the row "{subject}", on which the model must stay what it is.
        ids: Tokens, up to the target's last.
        subject: Index of the subject's last token.
        first_label: Index of the target's first token; `len(ids)` if the row has no target.
        share: Its share in its subject's mean over the rows of a context.
    """

    fact: int
    context: int
    ids: list[int]
    subject: int
    first_label: int
    share: float = 1.0

    @property
    def input_ids(self) -> list[int]:
        """`ids`, as scoring calls them."""
        return self.ids

    @property
    def is_document(self) -> bool:
        """Whether it is running text: a fact is not."""
        return False

    @property
    def item(self) -> int:
        """`fact`, as scoring calls it."""
        return self.fact

    @property
    def num_read(self) -> int:
        """Tokens from the subject's last on that the model reads."""
        return max(len(self.ids) - 1 if self.first_label < len(self.ids) else len(self.ids), 1) - self.subject

    def behind(self, token: int) -> FactRow:
        """Return the row behind another token."""
        return replace(self, ids=[token, *self.ids], subject=self.subject + 1, first_label=self.first_label + 1)


def chat_context(tokenizer: PreTrainedTokenizerBase) -> Context:
    """Return the tokenizer's chat template around a user's turn that is the prompt.

    Raises:
        ValueError: If there is no chat template, or it does not render a message as it is written.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("`chat=True`, but the tokenizer has no chat template; set `chat=False`.")
    rendered = rendered_question(tokenizer, "{prompt}")
    if rendered is None:
        raise ValueError(
            "`chat=True`, but the tokenizer's chat template does not render a message of the user as it is written; "
            "set `chat=False`."
        )
    text, start = rendered
    return Context(text[:start], text[start + len("{prompt}") :])


def bare_rows(facts: Sequence[Fact], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[FactRow]:
    """Return the row of each fact's bare prompt.

    Raises:
        ValueError: If a fact does not fit in `max_length` tokens.
    """
    return [_row(fact, Context(), tokenizer, index, 0, max_length) for index, fact in enumerate(facts)]


def context_rows(
    facts: Sequence[Fact],
    bare: Sequence[FactRow],
    contexts: Sequence[Context],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> list[list[FactRow]]:
    """Return, for each fact, its rows in every context and one for its subject alone.

    Args:
        facts: The facts.
        bare: Their rows in the first context, the bare prompt.
        contexts: All contexts, the bare prompt first.
        tokenizer: The model's tokenizer.
        max_length: Most tokens of a row.

    Raises:
        ValueError: If a fact does not fit in `max_length` tokens.
    """
    rows = []
    for row, fact in zip(bare, facts, strict=True):
        around = enumerate(contexts[1:], 1)
        others = [_row(fact, context, tokenizer, row.fact, number, max_length) for number, context in around]
        text = f"{fact.subject} is a"
        ids = tokenize(tokenizer, text)
        last = last_token_of(tokenizer, text, len(fact.subject), ids)
        rows.append([row, *others, FactRow(row.fact, -1, ids[: last + 1], last, last + 1)])
    return rows


def subject_rows(
    facts: Sequence[Fact], contexts: Sequence[Context], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[FactRow]:
    """Return the rows of all facts about one subject in every context, and those of the subject alone by its names."""
    of_facts = context_rows(facts, bare_rows(facts, tokenizer, max_length), contexts, tokenizer, max_length)
    alone = {tuple(own[-1].ids): own[-1] for own in of_facts}.values()
    rows = [replace(row, share=1 / len(facts)) for own in of_facts for row in own[:-1]]
    return [*rows, *(replace(row, share=1 / len(alone)) for row in alone)]


def _row(
    fact: Fact, context: Context, tokenizer: PreTrainedTokenizerBase, index: int, number: int, max_length: int
) -> FactRow:
    chat = context.after is not None
    prompt = context.before + fact.prompt + (context.after or "")
    ids, first = continued_prompt(tokenizer, prompt, fact.target if chat else fact.continuation, rendered=chat)
    if chat and tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]  # an answer ends; running text goes on
    if len(ids) > max_length:
        raise ValueError(
            f"`items[{index}]` has {len(ids)} tokens with its prefix, more than the {max_length} that the model reads: "
            f"shorten the prompt or the target of {fact.subject!r}."
        )
    end = len(context.before) + fact.subject_end
    text = prompt if chat else prompt + fact.continuation
    subject = last_token_of(tokenizer, text, end, ids, rendered=chat)
    return FactRow(index, number, ids, min(subject, first - 1), first)


@dataclass
class RowBatch:
    """Store rows that read equally many tokens from their subject on, and what came before them.

    Attributes:
        rows: The rows.
        ids: Tokens from the subject's last on (rows, tokens), or of whole rows, left-padded.
        inputs: `attention_mask` (rows, before + tokens) and, where the model takes them, `position_ids`.
        cache: Keys and values of the tokens before (left-padded); None if no row has any, or rows are whole.
        facts: Index of each row's subject (rows,).
        start: Index in `ids` of the subjects' last tokens: above 0 where rows are whole.
    """

    rows: list[FactRow]
    ids: Tensor
    inputs: dict[str, Tensor]
    cache: Cache | None
    facts: Tensor
    start: int = 0

    def fresh_cache(self) -> Cache | None:
        """Return a cache to which the model may append, sharing the kept tensors."""
        if self.cache is None:
            return None
        fresh = copy.copy(self.cache)
        fresh.layers = [copy.copy(layer) for layer in self.cache.layers]
        return fresh

    def model_inputs(self, tokens: int | None = None) -> dict[str, Any]:
        """Return what to call the model with, for the first `tokens` tokens from the subject on (all if None)."""
        left = 0 if tokens is None else self.ids.shape[1] - self.start - tokens
        inputs = {"input_ids": self.ids[:, : self.ids.shape[1] - left]}
        for name, value in self.inputs.items():
            inputs[name] = value[:, : value.shape[1] - left]
        return {**inputs, CACHE: self.fresh_cache()}

    def select(self, keep: Tensor) -> RowBatch:
        """Return a batch of the rows with these indices."""
        rows = [self.rows[i] for i in keep.tolist()]
        inputs = {name: value[keep] for name, value in self.inputs.items()}
        return RowBatch(rows, self.ids[keep], inputs, _chosen(self.cache, keep), self.facts[keep], self.start)


def row_batches(rows: Sequence[FactRow], tokens: int) -> Iterator[list[FactRow]]:
    """Yield rows in batches that read equally many tokens from the subject on, of at most `tokens` of these in all."""
    batch: list[FactRow] = []
    for row in sorted(rows, key=lambda row: (row.num_read, row.subject)):
        full = batch and (len(batch) + 1) * row.num_read > tokens
        if full or (batch and batch[0].num_read != row.num_read):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@dataclass
class PrefixCache:
    """Store the keys and values of each context's prefix, which all facts share: computed once, used for every fact.

    The prefixes of all contexts are one left-padded batch, with an empty row for rows of no context (the subject
    alone). A row of context c starts with the cached tokens of row c; only the tokens behind them are read again.

    Attributes:
        lengths: Tokens in common, by context; the last entry is for rows of no context, which share nothing.
        mask: Which of the (left-padded) tokens are real (contexts + 1, longest).
        cache: Their keys and values; None if nothing is shared.
        whole: Whether the model keeps more than keys and values, so that rows must be read whole.
    """

    lengths: list[int]
    mask: Tensor
    cache: Cache | None
    whole: bool = False

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, rows: Sequence[FactRow], num_contexts: int) -> PrefixCache:
        """Read what the rows of each context start with, before any subject."""
        device = execution_device(model.get_input_embeddings())
        probe = torch.tensor([rows[0].ids[:1]], device=device)
        whole = not keeps_keys_alone(model.base_model(input_ids=probe, use_cache=True).get(CACHE))
        shared: list[list[int]] = []
        for context in range(num_contexts):
            own = [row for row in rows if row.context == context]
            length = min(row.subject for row in own)
            for row in own:
                length = min(length, shared_length(own[0].ids, row.ids))
            shared.append(own[0].ids[:length])
        window = attention_window(model.config.get_text_config(decoder=True))
        if whole or max(len(row.ids) for row in rows) + max(map(len, shared)) > window:  # padding would use it up
            shared = [[] for _ in shared]
        ids, mask = _left_padded([*shared, []], device)
        cache = None
        if ids.shape[1]:
            cache = model.base_model(input_ids=ids, **positioned(model, mask), use_cache=True)[CACHE]
        return cls([*map(len, shared), 0], mask, cache, whole)


@torch.no_grad()
def keep_before(model: PreTrainedModel, rows: Sequence[FactRow], prefixes: PrefixCache) -> RowBatch:
    """Read what stands before the subjects' last tokens, and keep its keys and values."""
    device = prefixes.mask.device
    contexts = torch.tensor([row.context for row in rows], device=device) % len(prefixes.lengths)
    starts = [prefixes.lengths[row.context] for row in rows]
    read = rows[0].num_read
    ids, mask = _left_padded(
        [row.ids[start : row.subject + read] for row, start in zip(rows, starts, strict=True)], device
    )
    # A row is: its context's prefix (`cached` tokens, in the cache), the rest of the prompt before the subject's last
    # token (`before`, read here), and the `read` tokens from there on, which stay in the batch.
    cached = prefixes.mask.shape[1]
    before = ids.shape[1] - read
    inputs = positioned(model, torch.cat([prefixes.mask[contexts], mask], 1))
    facts = torch.tensor([row.fact for row in rows], device=device)
    if prefixes.whole:
        return RowBatch(list(rows), ids, inputs, None, facts, before)
    cache = _chosen(prefixes.cache, contexts)
    if before:
        # Appends to the rows' own copies of the prefixes' keys and values.
        part = {name: value[:, : cached + before] for name, value in inputs.items()}
        if "position_ids" in part:
            part["position_ids"] = part["position_ids"][:, cached:]
        out = model.base_model(input_ids=ids[:, :before], **part, **{CACHE: cache}, use_cache=True)
        cache = out[CACHE]
    if "position_ids" in inputs:
        inputs["position_ids"] = inputs["position_ids"][:, cached + before :]
    return RowBatch(list(rows), ids[:, before:], inputs, cache, facts)


def _left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask (rows, tokens), padded on the left."""
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        if row:
            ids[i, -len(row) :] = torch.tensor(row)
            mask[i, -len(row) :] = 1
    return ids.to(device), mask.to(device)


def _chosen(cache: Cache | None, rows: Tensor) -> Cache | None:
    """Return a cache of the rows with these indices, to which the model may append."""
    if cache is None:
        return None
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in chosen.layers:
        layer.batch_select_indices(rows)  # type: ignore[union-attr]  # no linear attention here
    return chosen
