"""Where a model recalls a fact: causal tracing (Meng et al. 2022, "Locating and Editing Factual Associations", §2).

The subject's embeddings are corrupted with noise, and states of the clean run put back one at a time: how far each
brings back the probability of the answer is its indirect effect.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import indent
from typing import Any, NamedTuple

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.decoder import Decoder, execution_device, find_decoder
from memory_adapters.base_model.modes import evaluating
from memory_adapters.base_model.partial_forward import (
    BlockOutput,
    block_tuple_length,
    hidden_state,
    logits_at,
    resumed,
)
from memory_adapters.base_model.tokens import (
    continued_prompt,
    last_token_of,
    pad_rows,
    score_rows,
    shared_length,
    tokenize,
)
from memory_adapters.files.atomic import atomic_file
from memory_adapters.items import Fact
from memory_adapters.memit.projection import mlp_projection
from memory_adapters.peft_layers.virtual_tokens import virtual_tokens_disabled

__all__ = ["KINDS", "ROLES", "TraceTable", "load_known_facts", "trace_facts"]

KINDS = ("hidden", "mlp", "attention")
_SUBJECT_ROLES = ("first subject token", "middle subject tokens", "last subject token")
ROLES = (*_SUBJECT_ROLES, "first subsequent token", "further tokens", "last token")
Hooks = Mapping[nn.Module, Callable[..., Any]]


@dataclass(frozen=True, eq=False)
class TraceTable:
    """Store average indirect effects of states on the answer's probability, by token role and layer.

    A subject's only token is its last one. The prompt's last token is `"last token"`, even right after the subject,
    but `"last subject token"` where the prompt ends with the subject.

    Attributes:
        effects: For each kind of state (6 roles, num_layers), float64: the mean over facts of the mean over a fact's
            tokens of that role; NaN where no fact has one. Column l is for the output of block l (`"hidden"`), or for
            what the MLPs or attentions of `window` blocks around l add to the stream.
        roles: Names of the rows.
        total_effect: P_clean(answer) − P_corrupted(answer), mean over facts.
        num_facts: Facts traced.
        skipped: Facts left out because the model does not know them.
        window: Blocks restored together.
    """

    effects: dict[str, Tensor]
    roles: tuple[str, ...]
    total_effect: float
    num_facts: int
    skipped: int
    window: int

    def recommended_layers(self, count: int = 5) -> list[int]:
        """Return the `count` neighbouring blocks whose MLPs have the highest mean effect at the last subject token.

        There the MLPs look up what is known of the subject, before attention takes it to the prompt's end: these are
        the ones to edit (MEMIT, §4). Raises `ValueError` if `count` is out of range or MLPs were not traced.
        """
        if "mlp" not in self.effects:
            raise ValueError(f"`kinds` were {tuple(self.effects)}: trace 'mlp' too, which layers are chosen by.")
        effects = self.effects["mlp"][self.roles.index("last subject token")]
        if not 1 <= count <= len(effects):
            raise ValueError(f"`count={count}` must be between 1 and {len(effects)}, the number of blocks.")
        start = int(effects.unfold(0, count, 1).mean(-1).argmax())
        return list(range(start, start + count))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; None for NaN."""
        effects = {k: [[x if x == x else None for x in row] for row in e.tolist()] for k, e in self.effects.items()}
        return {**vars(self), "effects": effects, "roles": list(self.roles)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict()` as JSON, whole or not at all."""
        with atomic_file(path) as staging:
            staging.write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TraceTable:
        """Read what `save` wrote. Raises `ValueError` if the file holds something else."""
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(fields, dict) or set(fields) != set(cls.__dataclass_fields__):
            raise ValueError(f"`path={str(path)!r}` holds no TraceTable: give a file that `TraceTable.save` wrote.")
        effects = {kind: torch.from_numpy(np.array(rows, dtype=np.float64)) for kind, rows in fields["effects"].items()}
        return cls(**{**fields, "effects": effects, "roles": tuple(fields["roles"])})

    def __repr__(self) -> str:
        tops = {kind: [row.max(0) for row in effects] for kind, effects in self.effects.items()}
        cells = [[f"{x:+.3f} (layer {int(i)})" if x == x else "–" for x, i in top] for top in tops.values()]
        rows = [("highest effect", *tops), *zip(self.roles, *cells, strict=True)]
        table = tabulate(rows, tablefmt="plain", disable_numparse=True)
        facts = f"TraceTable: {self.num_facts} facts ({self.skipped} skipped), total effect {self.total_effect:+.3f}"
        return f"{facts}\n{indent(table, '  ')}"

    def _repr_html_(self) -> str:
        return f"<pre>{self!r}</pre>"


def load_known_facts(path: str | os.PathLike[str], limit: int | None = None) -> list[Fact]:
    """Read the first `limit` (None: all) records of a JSON list with `prompt`, `subject` and `attribute`, the format
    of the paper's data set `known_1000.json`. Raises `ValueError` if the file holds something else."""
    records, fields = json.loads(Path(path).read_text(encoding="utf-8")), ("prompt", "subject", "attribute")
    if not isinstance(records, list) or not all(isinstance(r, dict) and r.keys() >= set(fields) for r in records):
        raise ValueError(f"`path={str(path)!r}` must be a JSON list of records with the fields {', '.join(fields)}.")
    return [Fact(*(record[field] for field in fields)) for record in records[:limit]]


@torch.no_grad()
def trace_facts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    *,
    kinds: Sequence[str] = KINDS,
    noise: float = 3.0,
    samples: int = 10,
    window: int | None = None,
    only_known: bool = True,
    batch_tokens: int = 4096,
    seed: int = 0,
    progress: bool = True,
    layers_path: str | None = None,
) -> TraceTable:
    """Measure indirect effects P_restored(answer) − P_corrupted(answer), averaged over draws of noise and facts.

    The answer is the first token of a fact's target. The subject is corrupted where it stands last in the prompt;
    tokens before it cannot have an effect and are not restored.

    Args:
        model: A Hugging Face causal LM; it is left as it was.
        tokenizer: Its tokenizer.
        facts: What to trace.
        kinds: What to restore, of `"hidden"`, `"mlp"` and `"attention"`.
        noise: Standard deviation of the noise, in standard deviations of the input embeddings of the facts' subjects.
        samples: Draws of the noise a fact.
        window: Blocks restored together at layer l of MLP and attention: l − ⌊window/2⌋ to l + ⌈window/2⌉ − 1, where
            there are such; None for a fifth of the depth.
        only_known: Whether to leave out facts whose answer is not the model's first choice.
        batch_tokens: Most tokens a forward pass (but at least one row).
        seed: Of the noise, which is drawn alike for each fact; global generators are not used.
        progress: Whether to show a progress bar.
        layers_path: Dotted name of the blocks, for a model whose structure is not recognised.

    Raises:
        ValueError: If no fact is given or known, a setting is out of range, or blocks lack a part that `kinds` names.
    """
    if not facts:
        raise ValueError("`facts` is empty: give at least one fact to trace.")
    if not kinds or not set(kinds) <= set(KINDS) or len(set(kinds)) < len(kinds):
        raise ValueError(f"`kinds={tuple(kinds)}` must name some of {', '.join(KINDS)}, each once.")
    for name, value in {"noise": noise, "samples": samples, "window": window, "batch_tokens": batch_tokens}.items():
        if value is not None and not value > 0:
            raise ValueError(f"`{name}={value}` must be above 0.")
    decoder = find_decoder(model, layers_path)
    depth, device = decoder.num_layers, execution_device(decoder.embeddings)
    window = window or max(1, round(depth / 5))
    queries = [_Query.of(tokenizer, fact) for fact in facts]
    sums, counts, total = torch.zeros(len(kinds), len(ROLES), depth).double(), torch.zeros(len(ROLES), 1).double(), 0.0
    with evaluating(model), virtual_tokens_disabled(model):
        right = score_rows(model, decoder, [[*q.ids, q.answer] for q in queries], [len(q.ids) for q in queries]).right
        known = [query for query, hit in zip(queries, right, strict=True) if hit or not only_known]
        if not known:
            raise ValueError(f"The model knows none of {len(facts)} `facts`: give others or set `only_known=False`.")
        subjects = torch.tensor([i for q in queries for i in q.ids[q.first : q.last + 1]], device=device)
        embedded = decoder.embeddings(subjects).float().cpu()
        tracer = _Tracer(model, decoder, kinds, window, batch_tokens)
        with tqdm(total=len(known) * len(kinds) * depth, unit="layer", desc="tracing", disable=not progress) as bar:
            for query in known:
                shape = (samples, query.last - query.first + 1, embedded.shape[1])
                generator = torch.Generator().manual_seed(seed)
                draws = torch.randn(shape, generator=generator, dtype=torch.float32) * noise * embedded.std()
                effects, effect = tracer.trace(query, draws, bar.update)
                total += effect / len(known)
                members = F.one_hot(torch.tensor(query.roles()), len(ROLES)).double().T  # (roles, tokens)
                sums += members @ effects / members.sum(1, keepdim=True).clamp(min=1)
                counts += members.amax(1, keepdim=True)
    means = dict(zip(kinds, sums / counts, strict=True))
    return TraceTable(means, ROLES, total, len(known), len(queries) - len(known), window)


class _Query(NamedTuple):
    """Store a fact in tokens: the prompt's ids, the answer's id, indices of the subject's first and last token."""

    ids: list[int]
    answer: int
    first: int
    last: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, fact: Fact) -> _Query:
        joint, length = continued_prompt(tokenizer, fact.prompt, fact.continuation)
        ids, start = joint[:length], fact.subject_start
        last = last_token_of(tokenizer, fact.prompt, fact.subject_end, ids)
        return cls(ids, joint[length], min(shared_length(tokenize(tokenizer, fact.prompt[:start]), ids), last), last)

    def roles(self) -> list[int]:
        """Return the indices in `ROLES` of the tokens from the subject on."""
        inside, after = self.last - self.first + 1, len(self.ids) - 1 - self.last
        return [0, *[1] * (inside - 2), 2][max(0, 2 - inside) :] + [3, *[4] * (after - 2), 5][max(0, 2 - after) :]


def _attention(decoder: Decoder, layer: int) -> nn.Module:
    """Find a block's attention: the child without the MLP that takes a mask or, failing that, has most parameters."""
    mlp, found = None, []
    with suppress(ValueError):  # a mixture of experts has no such projection, and takes no mask
        mlp = mlp_projection(decoder, layer).module
    for child in decoder.blocks[layer].children():
        parts = list(child.modules())
        if len(parts) > 1 and not isinstance(child, BaseTunerLayer) and not any(part is mlp for part in parts):
            masked = "attention_mask" in inspect.signature(child.forward).parameters
            found.append((masked, sum(p.numel() for p in child.parameters() if p.ndim > 1), child))
    if not found:
        raise ValueError(f"Block {layer} (`{decoder.block_name(layer)}`) has no attention: leave it out of `kinds`.")
    return max(found, key=lambda entry: entry[:2])[2]


class _Tracer:
    """Trace facts one at a time. `modules` are those whose outputs are kept and restored, for each kind by layer."""

    def __init__(self, model: PreTrainedModel, decoder: Decoder, kinds: Sequence[str], window: int, batch_tokens: int):
        self.model, self.decoder, self.tuple_length = model, decoder, block_tuple_length(model, decoder, 0)
        self.kinds, self.window, self.batch_tokens = kinds, window, batch_tokens
        find: dict[str, Callable[[int], nn.Module]] = {"hidden": lambda layer: decoder.blocks[layer]}
        find |= {"mlp": lambda layer: mlp_projection(decoder, layer).module, "attention": partial(_attention, decoder)}
        self.modules = {kind: [find[kind](i) for i in range(decoder.num_layers)] for kind in {"hidden", *kinds}}

    def trace(self, query: _Query, noise: Tensor, advance: Callable[[], object]) -> tuple[Tensor, float]:
        """Measure indirect effects (kinds, tokens from the subject on, num_layers) and the total effect of one fact.

        `noise` (samples, subject tokens, width) corrupts its embeddings; `advance` is called after each layer.
        """
        limit = max(1, self.batch_tokens // len(query.ids))
        clean, p_clean = self.recorded(query, torch.zeros_like(noise[:1]), self.modules)
        runs = [self.recorded(query, part, ["hidden"]) for part in noise.split(limit)]
        corrupted = [torch.cat(states) for states in zip(*(kept["hidden"] for kept, _ in runs), strict=True)]
        p_corrupted = torch.cat([p for _, p in runs])
        pairs = torch.cartesian_prod(torch.arange(query.first, len(query.ids)), torch.arange(len(noise)))
        effects = torch.zeros(len(self.kinds), len(query.ids) - query.first, self.decoder.num_layers).double()
        for k, kind in enumerate(self.kinds):
            for layer in range(self.decoder.num_layers):
                below, above = (0, 1) if kind == "hidden" else (self.window // 2, (self.window + 1) // 2)
                low, high = max(0, layer - below), layer + above
                stored = low if kind == "hidden" else low - 1  # the hook of a resumed block still acts
                p = []
                for positions, draws in (batch.unbind(1) for batch in pairs.split(limit)):
                    pieces = zip(self.modules[kind][low:high], clean[kind][low:high], strict=True)
                    hooks = {module: partial(_put_back, states[0], positions) for module, states in pieces}
                    resume = (stored, corrupted[stored][draws]) if stored >= 0 else None
                    p.append(self.answer(query, noise[draws], hooks, resume))
                effects[k, :, layer] = (torch.cat(p).view(-1, len(noise)) - p_corrupted).mean(1)
                advance()
        return effects, (p_clean - p_corrupted).mean().item()

    def recorded(self, query: _Query, noise: Tensor, kinds: Iterable[str]) -> tuple[dict[str, list[Tensor]], Tensor]:
        """Return the modules' outputs (samples, tokens, hidden_size), by kind and layer; and P(answer) (samples,)."""
        kept: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
        hooks = {module: partial(_keep, kept[kind], len(noise)) for kind in kept for module in self.modules[kind]}
        return kept, self.answer(query, noise, hooks)

    def answer(self, query: _Query, noise: Tensor, hooks: Hooks, resume: tuple[int, Tensor] | None = None) -> Tensor:
        """Return P(answer) (rows,) in float64, one row a draw of `noise`, resumed at the output of a block if given."""
        inputs = pad_rows([query.ids] * len(noise), execution_device(self.decoder.embeddings))
        last = (torch.arange(len(query.ids)) == len(query.ids) - 1).expand(len(noise), -1)
        whole = F.pad(noise, (0, 0, query.first, len(query.ids) - 1 - query.last))
        with ExitStack() as stack:
            for module, hook in {**hooks, self.decoder.embeddings: lambda _m, _a, x: x + whole.to(x)}.items():
                stack.callback(module.register_forward_hook(hook, prepend=True).remove)
            if resume is not None:
                stack.enter_context(resumed(self.decoder, *resume, tuple_length=self.tuple_length))
            stack.enter_context(logits_at(self.decoder, last))
            logits = self.model(**inputs, use_cache=False).logits[0].float()
        return (logits[:, query.answer] - logits.logsumexp(-1)).double().exp().cpu()


def _added(args: tuple[Any, ...], output: BlockOutput, rows: int) -> tuple[Tensor, Tensor]:
    """Return a module's output (rows, tokens, hidden_size), and the stream if given it to add to (Bloom), else 0."""
    tensor = hidden_state(output)
    stream = next((x for x in args[1:] if isinstance(x, Tensor) and x.shape == tensor.shape), torch.zeros_like(tensor))
    return tensor.reshape(rows, -1, tensor.shape[-1]), stream.reshape(rows, -1, tensor.shape[-1])


def _keep(kept: list[Tensor], rows: int, _module: nn.Module, args: tuple[Any, ...], output: BlockOutput) -> None:
    kept.append(torch.sub(*_added(args, output, rows)))


def _put_back(
    clean: Tensor, positions: Tensor, _module: nn.Module, args: tuple[Any, ...], output: BlockOutput
) -> BlockOutput:
    """Return the output with what the clean run (tokens, hidden_size) had at one position in each row."""
    tensor, stream = _added(args, output, len(positions))
    at = (torch.arange(len(positions)), positions)
    restored = tensor.index_put(at, clean[positions] + stream[at]).view_as(hidden_state(output))
    return (restored, *output[1:]) if isinstance(output, tuple) else restored
