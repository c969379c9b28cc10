"""The encoder: the model itself, with a LoRA that is active only here, reads texts for slots, or keys and values."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import cast

import torch
from accelerate.utils import align_module_device
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from memory_adapters.base_model.decoder import Decoder, execution_device
from memory_adapters.base_model.modes import computes_in_bfloat16, plain_attention
from memory_adapters.memory_slots.config import MemorySlotsConfig
from memory_adapters.memory_slots.keys_values import at_places
from memory_adapters.memory_slots.slot_cache import KeyValue, run_behind
from memory_adapters.peft_layers.layers import adapter_layers, lora_linears

__all__ = ["Encoder", "EncoderParts"]

BATCH_TOKENS = 4096


class EncoderParts(nn.Module):
    """Store what the encoder trains beside its LoRA.

    Attributes:
        memory_tokens: Embeddings appended to a span (num_slots, embedding_size); read with `pooling="tokens"`.
        reconstruct: The embedding [AE], which asks for the text itself (1, embedding_size). Whatever else is asked
            stands behind the bare slots, as `generate` gives it; so [LM] and [FT] are not needed.
        projection: Matrices from the normalised last hidden states to slots, in units of the embeddings' RMS (offsets,
            embedding_size, embedding_size). With `pooling="mean"` one for each place in a slot's stretch of tokens, at
            first 0; with `"tokens"` a single one, at first the identity; none with `space="kv"`.
        embedding_rms: RMS of the model's token embeddings.
    """

    def __init__(self, config: MemorySlotsConfig, decoder: Decoder) -> None:
        super().__init__()
        with align_module_device(decoder.embeddings):
            table = cast(Tensor, decoder.embeddings.weight).detach()[: 1 << 14].float().clone()
        device = execution_device(decoder.embeddings)
        generator = torch.Generator().manual_seed(config.seed)
        mean, spread = table.mean(0).cpu(), table.std(0).cpu()

        def like_tokens(rows: int) -> nn.Parameter:
            noise = torch.randn(rows, len(mean), generator=generator, dtype=torch.float32)
            return nn.Parameter((mean + spread * noise).to(device), requires_grad=False)

        self.pooling = config.pooling
        self.memory_tokens = like_tokens(config.num_memory_tokens)
        self.reconstruct = like_tokens(1)
        first = self._first_matrix(len(mean), device)
        self.projection = nn.Parameter(first.repeat(config.offsets, 1, 1), requires_grad=False)
        self.embedding_rms = float(table.square().mean().sqrt())

    def _first_matrix(self, width: int, device: torch.device) -> Tensor:
        return (torch.zeros if self.pooling == "mean" else torch.eye)(width, width, device=device)

    def is_projection_trained(self) -> bool:
        """Return whether the matrices are other than at first."""
        return bool((self.projection != self._first_matrix(self.projection.shape[-1], self.projection.device)).any())


class Encoder:
    """Compress spans of tokens on one model.

    Args:
        model: The causal LM.
        adapter_name: Name of the LoRA.
        config: Settings.
        parts: What it has beside the LoRA.
        decoder: Parts of the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapter_name: str,
        config: MemorySlotsConfig,
        parts: EncoderParts,
        decoder: Decoder,
    ) -> None:
        self.model, self.adapter_name, self.config, self.parts = model, adapter_name, config, parts
        self.decoder = decoder
        self.device = execution_device(self.decoder.embeddings)
        self.stack = cast(PreTrainedModel, model.get_submodule(self.decoder.stack_path))  # the model without its head
        self.mode: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def refines_in_bfloat16(self) -> bool:
        """Whether refinement's passes run in bfloat16."""
        return computes_in_bfloat16(self.config.precision, self.device)

    def layers(self) -> list[LoraLayer]:
        """Return the LoRA's layers."""
        found = adapter_layers(self.model, self.adapter_name)
        return [layer for layer in found if isinstance(layer, LoraLayer)]

    def disable(self) -> None:
        """Leave the LoRA out of all passes but those within `active`."""
        for layer in self.layers():
            for linear in lora_linears(layer, self.adapter_name):
                linear.float()
            layer.scaling[self.adapter_name] = 0.0
            layer._active_adapter = [name for name in layer.active_adapters if name != self.adapter_name]

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """Run the model, within this context, without any adapter and without slots."""
        every = adapter_layers(self.model)
        before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in every]
        mode, self.mode = self.mode, self.adapters_disabled
        try:
            for layer in every:
                layer._active_adapter = []
            with plain_attention(self.device) if torch.is_grad_enabled() else nullcontext():
                yield
        finally:
            self.mode = mode
            for layer, names, disabled in before:
                layer._active_adapter, layer._disable_adapters = names, disabled

    @contextmanager
    def active(self) -> Iterator[None]:
        """Use the encoder's LoRA, within this context, and no other adapter."""
        layers = self.layers()
        with self.adapters_disabled():
            self.mode = self.active
            try:
                for layer in layers:
                    layer._active_adapter, layer._disable_adapters = [self.adapter_name], False
                    layer.scaling[self.adapter_name] = self.config.lora_alpha / self.config.lora_rank
                yield
            finally:
                for layer in layers:
                    layer.scaling[self.adapter_name] = 0.0

    def recomputing(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return contexts for a checkpointed pass and for its second run, backwards: both see the same adapters."""
        return nullcontext(), self.mode()

    def slots(self, spans: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return each span's slots (slots, embedding_size) in float32, from one pass; with gradients if they are on."""
        counts = [self.config.slots_for(len(span)) for span in spans]
        appended = counts if self.config.pooling == "tokens" else [0] * len(spans)
        length = max(len(span) + n for span, n in zip(spans, appended, strict=True))
        rows, mask = [], torch.zeros(len(spans), length, dtype=torch.long, device=self.device)
        texts = [self.decoder.embeddings(torch.tensor(list(span), device=self.device)) for span in spans]
        for i, (text, n) in enumerate(zip(texts, appended, strict=True)):
            row = torch.cat([text, self.parts.memory_tokens[:n].to(text)])
            rows.append(nn.functional.pad(row, (0, 0, length - len(row), 0)))
            mask[i, length - len(row) :] = 1
        inputs = {"inputs_embeds": torch.stack(rows), "attention_mask": mask}
        if takes_positions(self.stack):
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        if self.config.bidirectional:
            inputs["attention_mask"] = both_ways(mask, 0, inputs["inputs_embeds"].dtype)
        with self.active():
            states = self.stack(**inputs, use_cache=False).last_hidden_state.float()
        states = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-12)  # padding may be 0
        matrices = self.parts.projection.float() * self.parts.embedding_rms
        if self.config.pooling == "tokens":
            return [states[i, length - n :] @ matrices[0] for i, n in enumerate(counts)]
        places, offsets, shares = stretches([len(text) for text in texts], counts, self.device)
        pooled = torch.zeros(sum(counts), states.shape[-1], device=self.device, dtype=torch.float32)
        pooled = pooled.index_add(0, places, torch.cat(texts).float() * shares[:, None])
        flat = torch.cat([states[i, length - len(text) :] for i, text in enumerate(texts)])
        for j, matrix in enumerate(matrices):
            own = offsets == j
            pooled = pooled.index_add(0, places[own], (flat[own] @ matrix).float())
        return list(pooled.split(counts))

    def keys_values(self, prefix: Sequence[int], ids: Sequence[int], places: Sequence[Tensor]) -> list[KeyValue]:
        """Return keys and values of a text, with gradients if they are on.

        Args:
            prefix: Token ids before the text.
            ids: The text.
            places: Of each block (heads, kept): which tokens of the text are kept.

        Returns:
            Of each block keys and values (heads, kept, head_dim).
        """
        first = len(prefix)
        return [
            (at_places(keys[0, :, first:], own), at_places(values[0, :, first:], own))
            for (keys, values), own in zip(self._read(prefix, ids), places, strict=True)
        ]

    def _read(self, prefix: Sequence[int], ids: Sequence[int]) -> list[KeyValue]:
        """Return keys and values of a text and what stands before it, of each block (1, heads, tokens, head_dim)."""
        inputs = {"input_ids": torch.tensor([[*prefix, *ids]], device=self.device)}
        if self.config.bidirectional:
            dtype = self.decoder.embeddings(inputs["input_ids"]).dtype
            inputs["attention_mask"] = both_ways(torch.ones_like(inputs["input_ids"]), len(prefix), dtype)
        with self.active():
            return run_behind(self.stack, [], 0, **inputs)[1]

    def check_bidirectional(self) -> None:
        """Raise a `ValueError` unless a token's keys and values depend on the tokens behind it."""
        (keys, _), (others, _) = (self._read([], [5, 6, last])[-1] for last in (7, 8))
        if self.decoder.num_layers > 1 and torch.equal(keys[:, :, 0], others[:, :, 0]):
            raise ValueError("the mask changes nothing")

    @torch.no_grad()
    def compress(self, spans: Sequence[Sequence[int]], progress: bool) -> list[Tensor]:
        """Return the slots of each span (slots, embedding_size), computed in batches."""
        size = max(1, BATCH_TOKENS // max(len(span) + self.config.num_slots for span in spans))
        found: list[Tensor] = []
        with tqdm(total=len(spans), unit="span", desc="compressing", disable=not progress or len(spans) == 1) as bar:
            for start in range(0, len(spans), size):
                found += self.slots(spans[start : start + size])
                bar.update(len(found) - bar.n)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Return the encoder's tensors by name: LoRA and parts."""
        found = {f"memory_slots.{name}": parameter.detach() for name, parameter in self.parts.named_parameters()}
        for name, module in self.model.named_modules():
            if isinstance(module, LoraLayer) and self.adapter_name in module.lora_A:
                down, up = lora_linears(module, self.adapter_name)
                found[f"{name}.lora_A.weight"] = down.weight.detach()
                found[f"{name}.lora_B.weight"] = up.weight.detach()
        return found

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are saved: of an encoder that was never trained, those that it does use."""
        found, trained = self.tensors(), bool(self.config.encoder_steps) or self.parts.is_projection_trained()
        if trained or any(t.any() for name, t in found.items() if "lora_B" in name):
            return found
        return {name: found[name] for name in self.config.untrained_tensors}

    def parameters(self) -> list[nn.Parameter]:
        """Return what training changes."""
        lora = [
            linear.get_parameter("weight")
            for layer in self.layers()
            for linear in lora_linears(layer, self.adapter_name)
        ]
        own = [self.parts.reconstruct, self.parts.projection]
        return [*lora, *own, *([self.parts.memory_tokens] if self.config.pooling == "tokens" else [])]

    def fingerprint(self) -> str:
        """Return the SHA-256 of the tensors that are saved."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.saved_tensors().items()):
            digest.update(name.encode())
            digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def stretches(lengths: Sequence[int], counts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for the spans' tokens in turn, slot, place in that slot's stretch, and 1 ÷ its length, each (tokens,)."""
    places: list[int] = []
    offsets: list[int] = []
    shares: list[float] = []
    first = 0
    for tokens, slots in zip(lengths, counts, strict=True):
        edges = [i * tokens // slots for i in range(slots + 1)]
        for i, (a, b) in enumerate(pairwise(edges)):
            places += [first + i] * (b - a)
            offsets += range(b - a)
            shares += [1 / (b - a)] * (b - a)
        first += slots
    return (
        torch.tensor(places, device=device),
        torch.tensor(offsets, device=device),
        torch.tensor(shares, device=device, dtype=torch.float32),
    )


def both_ways(mask: Tensor, first: int, dtype: torch.dtype) -> Tensor:
    """Return an attention mask (rows, 1, tokens, tokens), to be added, with which all tokens but the first see all.

    Args:
        mask: 0 for padding (rows, tokens).
        first: Tokens at the beginning of each row that see those before them alone.
        dtype: Of the result.
    """
    length = mask.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    seen[first:] = True
    seen = seen[None] & mask.bool()[:, None]
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


def takes_positions(stack: PreTrainedModel) -> bool:
    """Return whether a decoder stack takes `position_ids`."""
    return "position_ids" in inspect.signature(stack.forward).parameters
