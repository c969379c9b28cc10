"""Write facts by MEMIT one at a time, with whole forward passes and dense solves: the baseline of `edit_speed.py`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memory_adapters import Covariance, Fact, MemitConfig
from memory_adapters.base_model.decoder import execution_device, find_decoder
from memory_adapters.base_model.partial_forward import hidden_state
from memory_adapters.memit.ledger import LEAST_REGULARIZATION
from memory_adapters.memit.projection import mlp_projection
from memory_adapters.memit.prompts import Context, FactRow, bare_rows, context_rows
from memory_adapters.memit.targets import added


@dataclass
class PlainMemit:
    """Compute the weight changes of facts in the plainest way, as the library does or as MEMIT's authors do.

    Attributes:
        seconds: Wall time of each stage.
    """

    model: Any
    tokenizer: Any
    config: MemitConfig
    covariance: Covariance
    contexts: Sequence[Context]
    seconds: dict[str, float] = field(default_factory=lambda: {"z": 0.0, "keys": 0.0, "solve": 0.0})

    def __post_init__(self) -> None:
        self.decoder = find_decoder(self.model)
        self.layers = self.config.resolved(self.decoder)
        self.device = execution_device(self.decoder.embeddings)
        self.projections: dict[int, Any] = {layer: mlp_projection(self.decoder, layer).module for layer in self.layers}

    def write(self, facts: Sequence[Fact], together: bool) -> dict[int, Tensor]:
        """Return the change of each layer's weight, (hidden_size, d_in); the weights stay as they were.

        Args:
            facts: What to write.
            together: Whether the changes at all layers are found together, and a fact's keys with its own below in
                place, as the library does; otherwise one δ is found at the last layer, and its rest shared out with the
                lower layers edited for all facts, as MEMIT's authors do.
        """
        bare = [bare_rows([fact], self.tokenizer, 1 << 30) for fact in facts]
        rows = [
            context_rows([fact], own, self.contexts, self.tokenizer, 1 << 30)[0]
            for fact, own in zip(facts, bare, strict=True)
        ]
        start = time.perf_counter()
        targets = [self.target(own, together) for own in rows]
        self.seconds["z"] += time.perf_counter() - start
        changes: dict[int, Tensor] = {}
        missing = torch.zeros(self.decoder.hidden_size, len(facts), dtype=torch.float64, device=self.device)
        for i, layer in enumerate(self.layers):
            start = time.perf_counter()
            left = len(self.layers) - i
            keys, residuals = [], []
            for own, target in zip(rows, targets, strict=True):
                pushed = dict(zip(self.layers[:i], target[1], strict=False)) if together else {}
                found = [self.visit(row, layer, pushed) for row in own if row.context >= 0]
                prefixed = torch.stack([key for key, _ in found[1:]]).mean(0)
                keys.append(torch.stack([found[0][0], prefixed]) / 2**0.5)
                h0, change = target
                residuals.append(change[i] if together else (h0 + change[0] - found[0][1]) / left)
            self.seconds["keys"] += time.perf_counter() - start
            start = time.perf_counter()
            both, R = torch.stack(keys).double(), torch.stack(residuals, 1).double()
            K, mean = both.flatten(0, 1).T, both.sum(1).T / 2**0.5
            share = self.config.regularization
            share = LEAST_REGULARIZATION + len(facts) / len(K) if share is None else share
            cost = share * len(K) * self.covariance.shrunk(layer).to(K)
            if together:  # what lower layers did not realise is shared out, too
                R += missing / left
                missing = missing * (1 - 1 / left) + R
            changes[layer] = (R @ torch.linalg.solve(cost + K @ K.T, mean).T).float()
            missing = missing - changes[layer].double() @ mean
            self.seconds["solve"] += time.perf_counter() - start
            if not together:
                self.projections[layer].weight.data += changes[layer]
        if not together:
            for layer, change in changes.items():
                self.projections[layer].weight.data -= change
        return changes

    @contextmanager
    def pushed(self, changes: Mapping[int, Tensor], rows: Tensor, places: Tensor) -> Iterator[None]:
        """Add a change (hidden_size,) to the outputs of projections, within this context, at a place in each row."""

        def placed(output: Tensor, change: Tensor) -> Tensor:
            everywhere = output.new_zeros(len(rows), output.numel() // output.shape[-1] // len(rows), output.shape[-1])
            everywhere[rows, places] = change.to(output)
            return everywhere

        with ExitStack() as stack:
            for layer, change in changes.items():
                stack.enter_context(added(self.projections[layer], partial(placed, change=change)))
            yield

    @torch.no_grad()
    def visit(self, row: FactRow, layer: int, changes: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the key at `layer` and the hidden state at the last edited block, at the subject's last token."""
        keys: list[Tensor] = []
        streams: list[Tensor] = []
        handles = [
            self.projections[layer].register_forward_pre_hook(
                lambda _m, a: keys.append(a[0].reshape(len(row.ids), -1)[row.subject])
            ),
            self.decoder.blocks[self.layers[-1]].register_forward_hook(
                lambda _m, _a, o: streams.append(hidden_state(o)[0, row.subject])
            ),
        ]
        with self.pushed(changes, torch.zeros(1, dtype=torch.long), torch.tensor([row.subject])):
            self.model(input_ids=torch.tensor([row.ids], device=self.device))
        for handle in handles:
            handle.remove()
        return keys[0], streams[0]

    def target(self, rows: Sequence[FactRow], together: bool) -> tuple[Tensor, Tensor]:
        """Find what one fact asks of the layers, or of the last one, by whole forward passes over all its rows.

        Returns:
            The stream h₀ at the last edited block (hidden_size,), and the changes (layers, hidden_size).
        """
        config, layers = self.config, self.layers if together else self.layers[-1:]
        length = max(len(row.ids) for row in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long, device=self.device)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)] = torch.tensor(row.ids, device=self.device)
            mask[i, : len(row.ids)] = 1
        h0 = self.visit(rows[0], self.layers[-1], {})[1]
        rate = config.learning_rate * float(h0.square().mean().sqrt()) / len(layers)
        delta = torch.zeros(len(layers), len(h0), dtype=h0.dtype, device=h0.device, requires_grad=True)
        authors = torch.optim.Adam([delta], lr=rate)  # a second moment for each coordinate
        moment, square = torch.zeros_like(delta), 0.0
        places = torch.tensor([row.subject for row in rows])
        base = None
        for step in range(config.steps):
            with self.pushed(dict(zip(layers, delta, strict=True)), torch.arange(len(rows)), places):
                logs = self.model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
            losses = []
            for i, row in enumerate(rows):
                if row.context >= 0:
                    labels = torch.tensor(row.ids[row.first_label :], device=self.device)
                    losses.append(F.nll_loss(logs[i, row.first_label - 1 : len(row.ids) - 1], labels))
                else:
                    now = logs[i, row.subject]
                    base = now.detach() if base is None else base
                    kept = (now.exp() * (now - base)).sum()
            decay = config.weight_decay * delta.norm() / h0.norm() ** 2
            loss = torch.stack(losses).mean() + config.kl_factor * kept + decay
            if loss < config.target_loss or step + 1 == config.steps:
                break
            authors.zero_grad()
            loss.backward()
            if not together:
                authors.step()
            with torch.no_grad():
                if together:
                    moment = 0.9 * moment + 0.1 * delta.grad
                    square = 0.999 * square + 0.001 * float(delta.grad.square().mean())
                    root = (square / (1 - 0.999 ** (step + 1))) ** 0.5
                    delta -= rate * moment / (1 - 0.9 ** (step + 1)) / (root + 1e-8)
                delta *= (config.clamp * h0.norm() / delta.sum(0).norm()).clamp(max=1)
        return h0, delta.detach()
