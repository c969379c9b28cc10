"""Settings of closed-form editing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftConfig

from memory_adapters.base_model.decoder import Decoder, resolve_layers
from memory_adapters.config import STATE, TRAINING, MemoryConfig, MemoryPeftType
from memory_adapters.items import Fact, by_subject
from memory_adapters.keys.gate import check_keys, key_shapes
from memory_adapters.memit.ledger import Ledger
from memory_adapters.memit.projection import mlp_projection
from memory_adapters.memit.solvers import SOLVERS
from memory_adapters.validation import check_choice, check_flag, check_number, checked_layers

__all__ = ["MemitConfig"]

GATES = ("keys",)


@dataclass
class MemitConfig(MemoryConfig):
    """Configure MEMIT (Meng et al. 2023): ΔW = R Kᵀ (λC₀ + K Kᵀ)⁻¹ on the MLP output projections of a few blocks.

    ΔW is a product of two thin matrices and lives on the model as a LoRA adapter: B = R, A = Kᵀ (λC₀ + K Kᵀ)⁻¹.
    Nothing here is in units of a particular model: λ is relative to the covariance, steps and norms to the stream.

    Attributes:
        layers: Blocks to edit: indices (negatives count from the top), or a range of depth. Resolved to indices when
            the memory is injected. The more blocks share an edit, the less it harms other text; C₀ takes 4 · d_in²
            bytes a block. `memit.tracing.trace_facts` measures where a model keeps its facts.
        solver: `"memit"`, `"alphaedit"` (ΔW leaves the directions in use alone) or `"emmet"` (ΔW K = R exactly).
        regularization: λ as a share of d_in, which is the mean of kᵀ C₀⁻¹ k over ordinary text: 1 weighs a fact like
            an ordinary token. GPT-J's λ = 15,000 is 0.92 in these units. None for 0.2 + n ÷ d_in with n subjects: few
            are held exactly, and the more there are, the more each has to leave other text alone.
        null_space: For alphaedit: the share of C₀'s directions, those in which ordinary keys are least, that may
            change.
        gate: `"keys"` to let the edit act, inside this library, only at tokens near keys of its subjects, which are
            found in the output of the block below the edited ones: all other text is the base model's, bit for bit.
            None to let it act everywhere, as the exports do and every program that loads the LoRA alone.
        names: With a gate: for each subject, the token ids of its spellings. Filled in by `write`.
        key_owners: With a gate: for each key, the index of its subject. Filled in by `write`.
        steps: Most evaluations of the loss of a subject's changes δ of the edited blocks, and one.
        learning_rate: Adam's, of the sum of the changes, in units of the RMS of the stream h₀ at the last edited block.
        clamp: Largest ‖Σ δ‖ / ‖h₀‖.
        target_loss: A subject's optimisation ends below this loss.
        kl_factor: Weight of KL(edited ‖ base) at the subject in "{subject} is a".
        weight_decay: Weight of ‖δ‖ / ‖h₀‖².
        num_prefixes: Sampled openings behind which a fact must hold, beside its bare prompt.
        prefix_length: Their length in tokens.
        chat: Whether a fact must hold as the answer to its prompt in the tokenizer's chat template too; None for
            where the tokenizer has one that renders a message as it is written. Resolved by the first `write`.
        precision: Of the forward passes that find δ: `"model"` for the model's own, or `"bfloat16"` where that is
            fast: a CPU without its instructions (AVX-512 on x86) takes the model's own.
        covariance_tokens: Tokens of text sampled from the model, for C₀ when `write` is given none.
        shrinkage: ρ of C₀'s shrinkage in [0, 1]; None to estimate it from the number of tokens.
        batch_tokens: Tokens in one forward pass; None for what fits in the free memory.
        seed: Of the prefixes and the sampled text.
    """

    method_name: ClassVar[str] = "Closed-form edit (MEMIT)"
    kind: ClassVar[MemoryPeftType] = MemoryPeftType("MEMIT")
    card_note: ClassVar[str] = (
        "It is an ordinary LoRA adapter too: `peft.PeftModel.from_pretrained(model, ...)` uses it without "
        "memory-adapters, and without its gate, if it has one: it then acts in every text. `memory_config.json`, "
        "`ledger.safetensors` and a gate's `keys.safetensors` are for writing more and forgetting.\n\n"
    )

    layers: Sequence[int | float] | int | float = (0.1, 0.43)
    solver: str = "memit"
    regularization: float | None = None
    null_space: float = 0.8
    gate: str | None = None
    names: list[list[list[int]]] = field(default_factory=list, repr=False, metadata=STATE)
    key_owners: list[int] = field(default_factory=list, repr=False, metadata=STATE)
    steps: int = field(default=13, metadata=TRAINING)
    learning_rate: float = field(default=0.18, metadata=TRAINING)
    clamp: float = field(default=0.75, metadata=TRAINING)
    target_loss: float = field(default=0.05, metadata=TRAINING)
    kl_factor: float = field(default=0.0625, metadata=TRAINING)
    weight_decay: float = field(default=0.5, metadata=TRAINING)
    num_prefixes: int = field(default=2, metadata=TRAINING)
    prefix_length: int = field(default=10, metadata=TRAINING)
    chat: bool | None = field(default=None, metadata=TRAINING)
    precision: str = field(default="model", metadata=TRAINING)
    covariance_tokens: int = field(default=16384, metadata=TRAINING)
    shrinkage: float | None = field(default=None, metadata=TRAINING)
    batch_tokens: int | None = field(default=None, metadata=TRAINING)
    seed: int = field(default=0, metadata=TRAINING)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.kind
        self.task_type = "CAUSAL_LM"
        self.layers = checked_layers(self.layers)
        check_choice("solver", self.solver, SOLVERS)
        if self.regularization is not None:
            check_number("regularization", self.regularization, low=0, open_low=True)
        check_number("null_space", self.null_space, low=0, high=1, open_low=True)
        if self.gate is not None:
            check_choice("gate", self.gate, GATES)
        check_keys(self.names, self.key_owners)
        check_number("steps", self.steps, low=1, integer=True)
        check_number("learning_rate", self.learning_rate, low=0, open_low=True)
        check_number("clamp", self.clamp, low=0, open_low=True)
        check_number("target_loss", self.target_loss, low=0)
        check_number("kl_factor", self.kl_factor, low=0)
        check_number("weight_decay", self.weight_decay, low=0)
        check_number("num_prefixes", self.num_prefixes, low=0, high=1000, integer=True)
        check_number("prefix_length", self.prefix_length, low=1, integer=True)
        check_choice("precision", self.precision, ("model", "bfloat16"))
        check_number("covariance_tokens", self.covariance_tokens, low=1, integer=True)
        if self.shrinkage is not None:
            check_number("shrinkage", self.shrinkage, low=0, high=1)
        if self.batch_tokens is not None:
            check_number("batch_tokens", self.batch_tokens, low=1, integer=True)
        check_number("seed", self.seed, low=0, integer=True)
        if self.chat is not None:
            check_flag("chat", self.chat)
        if not all(isinstance(item, Fact) for item in self.written_items()):
            raise ValueError(f"`items` of {type(self).__name__} must be facts.")

    @property
    def key_groups(self) -> list[int]:
        """Which of a subject's keys each context belongs to: bare prompt, sampled prefixes, chat template."""
        return [0, *[1] * self.num_prefixes, *([2 if self.num_prefixes else 1] if self.chat else [])]

    @property
    def keys_per_subject(self) -> int:
        """One for each group; a single one for an exact solver, which would have to tell nearly equal keys apart."""
        return 1 if SOLVERS[self.solver].exact else 1 + (self.num_prefixes > 0) + bool(self.chat)

    @property
    def ledger_settings(self) -> dict[str, Any]:
        """Settings of the ledger: an exact solver needs rows of more precision than float16's, and has no λ."""
        exact = SOLVERS[self.solver].exact
        return {"half": not exact, "regularization": 1.0 if exact else self.regularization}

    def resolved(self, decoder: Decoder) -> list[int]:
        """Return the blocks to edit, in rising order."""
        assert isinstance(self.layers, list)
        return resolve_layers(self.layers, decoder.num_layers)

    def resolve(self, decoder: Decoder) -> None:
        """Fill in the indices of the blocks to edit, each of which must have an MLP projection."""
        self.layers = self.resolved(decoder)
        for layer in self.layers:
            mlp_projection(decoder, layer)
        if self.gate and self.layers[0] == 0:
            raise ValueError(
                f"`gate={self.gate!r}` finds keys in the block below the edited ones, and `layers={self.layers}` "
                "begins with the lowest: choose blocks above it, or set `gate=None`."
            )

    @property
    def key_block(self) -> int:
        """The block whose output keys are compared with: the one below the edited blocks, once these are resolved."""
        assert isinstance(self.layers, list)
        return int(self.layers[0]) - 1

    def key_shapes(self, decoder: Decoder) -> dict[str, torch.Size]:
        """Return names and shapes of the gate's tensors."""
        return key_shapes(self.key_owners, decoder.hidden_size)

    def adapter_config(self, decoder: Decoder) -> PeftConfig:
        """Return the LoRA adapter that the edit is on the model, of rank 1 as long as nothing is written."""
        projections = [mlp_projection(decoder, layer) for layer in self.resolved(decoder)]
        return LoraConfig(
            r=1,
            lora_alpha=1,
            target_modules=[projection.name for projection in projections],
            fan_in_fan_out=projections[0].transposed,
            inference_mode=True,
            task_type="CAUSAL_LM",
            base_model_name_or_path=self.base_model_name_or_path,
        )

    def projection_names(self, decoder: Decoder) -> dict[int, str]:
        """Return the dotted name of each edited block's projection."""
        return {layer: mlp_projection(decoder, layer).name for layer in self.resolved(decoder)}

    def widths(self, decoder: Decoder) -> dict[int, int]:
        """Return d_in of each edited block's projection."""
        return {layer: mlp_projection(decoder, layer).in_features for layer in self.resolved(decoder)}

    def tensor_shapes(self, decoder: Decoder) -> dict[str, torch.Size]:
        """Return names and shapes of the ledger's tensors."""
        subjects = by_subject([fact for fact in self.written_items() if isinstance(fact, Fact)])
        each, widths = self.keys_per_subject, self.widths(decoder)
        return Ledger.tensor_shapes(len(subjects), widths, decoder.hidden_size, each, half=self.ledger_settings["half"])

    @classmethod
    def reference(cls, **settings: Any) -> MemitConfig:
        """Return the authors' settings for GPT-J. The changes of the blocks are found together all the same."""
        gptj: dict[str, Any] = dict(
            layers=[3, 4, 5, 6, 7, 8],
            regularization=15000 / 16384,
            steps=25,
            learning_rate=0.09,
            num_prefixes=5,
            chat=False,
        )
        return cls(**{**gptj, **settings})
