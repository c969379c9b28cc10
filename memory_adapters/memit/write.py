"""Write facts: find what they ask of each edited block, and their keys, in batches that fit in memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import psutil
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.decoder import Decoder, context_length, execution_device, find_decoder
from memory_adapters.base_model.modes import evaluating
from memory_adapters.base_model.nonfinite import rows_not_finite
from memory_adapters.base_model.partial_forward import capture_inputs
from memory_adapters.base_model.quantised import differentiable
from memory_adapters.base_model.sampling import sample_text, start_token
from memory_adapters.base_model.tokens import tokenize
from memory_adapters.items import Fact
from memory_adapters.memit.config import MemitConfig
from memory_adapters.memit.ledger import Ledger
from memory_adapters.memit.projection import mlp_projection
from memory_adapters.memit.prompts import (
    Context,
    FactRow,
    PrefixCache,
    bare_rows,
    chat_context,
    keep_before,
    row_batches,
    subject_rows,
)
from memory_adapters.memit.targets import TargetBatch, TargetFinder, find_targets, subject_keys
from memory_adapters.training.distributed import gather_items, share_of

__all__ = ["LedgerBuilder"]

OPENINGS = ("The", "Therefore", "Because", "I", "You")
MEMORY_SHARE = 0.25
# At the first tokens of a text the stream of many models is a hundred times as large as elsewhere: a short subject that
# begins its prompt would get changes that no other context has room for.
LARGEST_STREAM = 2.0  # times the median over a subject's contexts
SAME_KEY = 0.7  # cosine with the keys of other first tokens
CPU_BATCH = 1024
GPU_BATCH = 32768


@dataclass
class LedgerBuilder:
    """Build the ledger entries of facts on one model, without the edit that they will be part of.

    Attributes:
        model: The causal LM, frozen.
        tokenizer: Its tokenizer.
        config: Settings, with layers resolved.
        notes: What the user should know of the entries that were built.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: MemitConfig

    def __post_init__(self) -> None:
        self.decoder: Decoder = find_decoder(self.model, self.config.layers_path)
        self.layers = self.config.resolved(self.decoder)
        self.projections = [mlp_projection(self.decoder, layer) for layer in self.layers]
        self.max_length = context_length(self.model)
        self.notes: list[str] = []

    def contexts(self) -> list[Context]:
        """Return what a fact must hold in: the bare prompt first, then sampled prefixes and the chat template."""
        prompts = [OPENINGS[i % len(OPENINGS)] for i in range(self.config.num_prefixes)]
        found = [Context()]
        if prompts:
            texts = sample_text(
                self.model,
                self.tokenizer,
                prompts,
                num_tokens=self.config.prefix_length,
                seed=self.config.seed,
                top_k=5,
            )
            found += [Context(f"{text}. ") for text in texts]
        if self.config.chat:
            found.append(chat_context(self.tokenizer))
        return found

    def entries(self, subjects: Sequence[Sequence[Fact]], progress: bool) -> Ledger:
        """Return the entries of subjects, in their order; the work is shared among processes.

        Args:
            subjects: The facts about each.
            progress: Show a bar.

        Raises:
            ValueError: If a fact does not fit in the model's context, or its loss is not finite.
        """
        contexts = self.contexts()
        facts = [fact for group in subjects for fact in group]
        bare = bare_rows(facts, self.tokenizer, self.max_length)
        shared = self._shared_first_tokens(bare)
        opening = start_token(self.tokenizer)
        own = share_of(list(subjects))
        rows = [
            [
                row.behind(opening) if row.subject == 0 and row.ids[0] in shared else row
                for row in subject_rows(group, contexts, self.tokenizer, self.max_length)
            ]
            for group in own
        ]
        size = self._chunk(rows)
        parts: list[Ledger] = []
        bar = tqdm(total=len(own), unit="subject", desc="targets", disable=not progress)
        with bar, evaluating(self.model), differentiable(self.model):
            for start in range(0, len(own), size):
                chunk = slice(start, start + size)
                numbered = [replace(row, fact=i) for i, group in enumerate(rows[chunk]) for row in group]
                parts.append(self._chunk_entries(own[chunk], numbered, len(contexts), bar))
        single = [part.subset([i]) for part in parts for i in range(part.num_subjects)]
        return _joined(gather_items(single, len(subjects)))

    @torch.no_grad()
    def _shared_first_tokens(self, bare: Sequence[FactRow]) -> set[int]:
        """Return the subjects of one token that cannot be edited where they open a text, and note the prompts that do.

        The first token of a text takes attention that belongs nowhere, and has nearly the same key in many models,
        whatever it is: an edit there would act in every text.
        """
        first = [row for row in bare if row.subject == 0]
        if not first:
            return set()
        others = [tokenize(self.tokenizer, word)[0] for word in OPENINGS]
        tokens = list(dict.fromkeys([*(row.ids[0] for row in first), *others]))
        ids = torch.tensor(tokens, device=execution_device(self.decoder.embeddings))[:, None]
        keys = capture_inputs(self.model, [self.projections[0].module], input_ids=ids)[0].flatten(0, -2).float()
        keys = torch.nn.functional.normalize(keys)
        alike = (keys @ keys[[tokens.index(other) for other in others]].T).mean(1) > SAME_KEY
        shared = {token for token, same in zip(tokens, alike.tolist(), strict=True) if same}
        rows = [row for row in first if row.ids[0] in shared]
        if rows:
            prompts = ", ".join(repr(self.tokenizer.decode(row.ids[: row.first_label])) for row in rows[:3])
            prompts += ", …" * (len(rows) > 3)
            self.notes.append(
                f"{len(rows)} of {len(bare)} prompts begin with a subject of one token ({prompts}), and the first "
                "token of a text has one key in this model, whatever it is: these facts are written for prompts with "
                "text before them, and not for the bare prompt"
            )
        return shared

    def _chunk_entries(
        self, about: Sequence[Sequence[Fact]], rows: list[FactRow], num_contexts: int, bar: tqdm
    ) -> Ledger:
        finder = TargetFinder(self.model, self.decoder, self.layers, self.config.precision)
        h0 = torch.zeros(len(about), self.decoder.hidden_size, device=finder.device, dtype=torch.float32)
        sizes: list[list[float]] = [[] for _ in about]  # of the stream at the subject, in each context
        batches: list[TargetBatch] = []
        prefixes = PrefixCache.of(self.model, rows, num_contexts)
        for group in row_batches(rows, self._batch_tokens()):
            batch = keep_before(self.model, group, prefixes)
            states, last = finder.states(batch)
            batches.append(TargetBatch.of(batch, states, num_contexts, self.config.kl_factor))
            weights = torch.tensor([[row.share * (row.context == 0)] for row in group], device=h0.device)
            at_subject = last[:, batch.start].to(h0)
            h0.index_add_(0, batch.facts, at_subject * weights)
            for row, fact, size in zip(group, batch.facts.tolist(), at_subject.norm(dim=-1).tolist(), strict=True):
                if row.context >= 0:
                    sizes[fact].append(size)
        typical = torch.tensor([statistics.median_low(own) for own in sizes], device=h0.device)
        norms = torch.minimum(h0.norm(dim=-1), LARGEST_STREAM * typical)
        with finder.fast_weights():
            changes, _ = find_targets(finder, batches, norms, self.config, bar, [own[0].prompt for own in about])
        keys = subject_keys(finder, batches, self.config.key_groups, self.config.keys_per_subject, changes)
        shares = {layer: changes[:, i].contiguous() for i, layer in enumerate(self.layers)}
        for kind, of_layers in {"key": keys, "share of the change": shares}.items():
            for layer, values in of_layers.items():
                if bad := rows_not_finite(values):
                    prompt = about[bad[0] * len(about) // len(values)][0].prompt
                    raise ValueError(
                        f"The {kind} of the fact {prompt!r} at block {layer} holds NaN or infinity: check the model's "
                        "weights, or use it in bfloat16 or float32."
                    )
        return Ledger(
            tuple(fact for own in about for fact in own),
            {layer: values.cpu() for layer, values in keys.items()},
            {layer: values.cpu() for layer, values in shares.items()},
        )

    def _free_memory(self) -> int:
        device = self.model.device
        if device.type == "cuda":
            return torch.cuda.mem_get_info(device)[0]
        return psutil.virtual_memory().available

    def _batch_tokens(self) -> int:
        """Return how many tokens' activations from the first edited block on fit in a share of the free memory."""
        if self.config.batch_tokens is not None:
            return self.config.batch_tokens
        above = self.decoder.num_layers - self.layers[0]
        a_token = 4 * (above * (12 * self.decoder.hidden_size + 4 * self.projections[0].in_features))
        a_token += 4 * 4 * self.decoder.vocab_size
        cap = GPU_BATCH if self.model.device.type == "cuda" else CPU_BATCH
        return max(1, min(cap, int(MEMORY_SHARE * self._free_memory()) // a_token))

    def _chunk(self, rows: Sequence[Sequence[FactRow]]) -> int:
        """Return how many subjects' keys and values fit in a share of the free memory."""
        if not rows:
            return 1
        tokens = max(len(row.ids) for group in rows for row in group) * max(map(len, rows))
        kept = 2 * 4 * self.decoder.num_layers * self.decoder.hidden_size
        return max(1, min(4096, int(MEMORY_SHARE * self._free_memory()) // (tokens * kept)))


def _joined(parts: Sequence[Ledger]) -> Ledger:
    layers = parts[0].layers
    return Ledger(
        tuple(fact for part in parts for fact in part.facts),
        {layer: torch.cat([part.keys[layer] for part in parts]) for layer in layers},
        {layer: torch.cat([part.shares[layer] for part in parts]) for layer in layers},
    )
