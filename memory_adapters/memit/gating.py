"""The gate of an edit: it acts at tokens that are near keys of its subjects, and adds exactly 0 at all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, cast

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.decoder import Decoder, context_length
from memory_adapters.base_model.item_rows import Row, chat_row, fact_row
from memory_adapters.base_model.sampling import sample_text
from memory_adapters.items import Fact
from memory_adapters.keys.fitting import BlockKeys, fit_keys, unrelated_rows
from memory_adapters.keys.gate import KeyReader, KeySet, attach_keys
from memory_adapters.keys.things import NAME_WINDOW, Thing, key_rows, rendered, spelling_ids
from memory_adapters.memit.config import MemitConfig
from memory_adapters.peft_layers.layers import lora_linears
from memory_adapters.training.rows import make_prefixes, other_names

__all__ = ["FoundKeys", "attach_gate", "found_keys", "gate_lora"]

FoundKeys: TypeAlias = tuple[BlockKeys, list[list[list[int]]], list[str]]
"""Keys, the token ids of each subject's spellings, and notes."""

KEY_THRESHOLD, RAMP = 0.6, 0.1  # of similarity, which is 1 at a key; the slope is only read above or below 0
HELD = False  # open at a subject's tokens alone: held from there on, fewer questions in other words were answered
NUM_TEXTS, TEXT_TOKENS, NUM_PREFIXES = 24, 64, 2


class GatedA(nn.Linear):
    """Compute A x where keys are open, and 0 elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., rank) for x (..., d_in)."""
        reader, adapter_name = cast("tuple[KeyReader, str]", vars(self)["gate"])
        opened = reader.opened(adapter_name)
        if opened is None or len(opened.things) == 0:
            return x.new_zeros(*x.shape[:-1], self.out_features)
        mask = opened.mask.any(-1).to(x.device, x.dtype)
        return F.linear(x, self.weight) * mask.reshape(*x.shape[:-1], 1)  # some MLPs read all tokens as one row


def gate_lora(layer: LoraLayer, adapter_name: str, reader: KeyReader) -> None:
    """Let a LoRA act only where the keys that `reader` reads are open."""
    linear = lora_linears(layer, adapter_name)[0]
    gated = GatedA(linear.in_features, linear.out_features, bias=False, device="meta")
    gated.weight = linear.weight
    gated.train(linear.training)
    vars(gated)["gate"] = (reader, adapter_name)  # in a tuple, so that the reader is no child of this one
    layer.lora_A[adapter_name] = gated


def attach_gate(model: PreTrainedModel, decoder: Decoder, config: MemitConfig, adapter_name: str) -> KeyReader:
    """Put the keys that a config has on the model: their values are set later."""
    windows = [NAME_WINDOW] * len(config.names)
    keys = KeySet(decoder.hidden_size, config.key_owners, config.names, windows, held=HELD)
    return attach_keys(model, decoder, config.key_block, adapter_name, keys)


def found_keys(
    model: PreTrainedModel,
    decoder: Decoder,
    config: MemitConfig,
    tokenizer: PreTrainedTokenizerBase,
    subjects: Sequence[Sequence[Fact]],
) -> FoundKeys:
    """Find the keys of subjects, on the model without the edit."""
    texts = sample_text(model, tokenizer, [""] * NUM_TEXTS, num_tokens=TEXT_TOKENS, seed=config.seed)
    texts = [text for text in texts if text.strip()]
    prefixes = make_prefixes(texts, NUM_PREFIXES, config.seed)
    longest = context_length(model)
    things = [_thing(own, tokenizer) for own in subjects]
    rows = [(i, row) for i, thing in enumerate(things) for row in _rows(thing, tokenizer, prefixes)]
    items = [own[0] for own in subjects]
    (keys,), notes = fit_keys(
        model,
        decoder,
        [config.key_block],
        items,
        [(i, row) for i, row in rows if len(row.input_ids) <= longest],
        tokenizer,
        prefix=next(iter(prefixes), ""),
        unrelated=unrelated_rows(items, tokenizer, texts, longest, chat=True),
        threshold=KEY_THRESHOLD,
        ramp=RAMP,
    )
    return keys, [spelling_ids(thing, [], tokenizer)[0] for thing in things], notes


def _thing(facts: Sequence[Fact], tokenizer: PreTrainedTokenizerBase) -> Thing:
    names = (name for fact in facts for name in (fact.subject, *other_names(fact, tokenizer)))
    return Thing(facts[0].subject, tuple(dict.fromkeys(names)), tuple(facts))


def _rows(thing: Thing, tokenizer: PreTrainedTokenizerBase, prefixes: Sequence[str]) -> list[Row]:
    """Return rows that name a subject, with its keys there: bare prompts, behind prefixes, and in chats."""
    rows = key_rows(thing, tokenizer)
    for fact in thing.items:
        assert isinstance(fact, Fact)
        rows += [fact_row(fact, tokenizer, prefix) for prefix in ("", *prefixes)]
        rows += [fact_row(fact, tokenizer, alias=name) for name in other_names(fact, tokenizer)]
        rows += rendered([chat_row(fact, tokenizer)])
    return [row for row in rows if row.key_positions]
