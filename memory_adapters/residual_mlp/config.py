"""Settings of the gated residual MLP memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers.activations import ACT2FN

from memory_adapters.base_model.decoder import Decoder, resolve_layers
from memory_adapters.config import STATE, TRAINING, MemoryConfig, MemoryPeftType
from memory_adapters.validation import check_choice, check_flag, check_number, checked_layers

__all__ = ["MemoryAdapterConfig"]


@dataclass
class MemoryAdapterConfig(MemoryConfig):
    """Configure a gated residual MLP on the output x of chosen decoder blocks.

    With the defaults, at each token,

        x ← x + g(x) · gate · rms(x) · LayerNorm(W_down · act(W_up · n(x))),    n(x) = (x − mean) / std,

    where g(x) in [0, 1] opens only where x is near a key of what was written, and is exactly 0 elsewhere.
    `MemoryAdapterConfig.fever_experiment()` is the original x + gate · LayerNorm(W_down · act(W_up · x)).

    Attributes:
        layers: Block indices (negatives count from the top), a float in [0, 1] (the block at that depth), or two (a
            range of depth). Resolved to indices when the memory is injected.
        memory_dim: Hidden width of the MLP.
        activation: Name of a transformers activation.
        gate_init: Start of the scalar gate. None for 1.0 with keys (a memory without keys is closed, so it still
            starts as the identity) and 0.0 otherwise (the identity, though open). The experiment's is 1.0.
        token_gate: `"keys"` (open near written keys, found in closed form by `write`), `"sigmoid"` (a linear router,
            trained), or `"none"` (open at every token).
        key_threshold: Similarity to a key (1 at the key, about 0 on unrelated text) below which nothing is added.
        key_ramp: How far above the threshold the token gate reaches 1.
        router_keys: Keep keys also where the token gate uses none, so that `route_memories` can tell what was written.
        num_keys: Keys stored a block. Grows with `write`; leave it at 0.
        stream_scale: Read the normalised stream and add in units of its RMS, instead of absolute values.
        norm_cap: Largest norm of what is added, relative to the norm of x; None for no cap.
        dropout: Dropout after the activation, in training.
        weight: Factor on what the memory adds, for blending several memories.
        learning_rate: Peak learning rate (AdamW, cosine schedule) of the MLP.
        gate_learning_rate: Peak learning rate of the scalar gate and the sigmoid router, which have no weight decay.
        num_train_epochs: Most passes over the items.
        min_steps: Small writes make more passes, up to this many steps.
        target_loss: Training ends after an epoch whose mean loss is below this; 0 to make all passes.
        batch_size: Rows a step.
        warmup_steps: Steps of linear warm-up.
        weight_decay: AdamW's decoupled weight decay of the MLP.
        max_grad_norm: Gradient clipping.
        num_prefixes: Varied prefixes behind which each fact is trained beside its bare prompt; 0 for none.
        max_length: Longest row in tokens; longer documents are split into windows. None for the model's context.
        locality_weight: Weight of KL(base ‖ memory) on text that must not change: how the base continues each subject
            in other contexts, the prompts with other subjects, and unrelated text. 0 for none.
        distillation_weight: Share of the loss that is KL from the base model reading the item in its context, against
            next-token loss. In [0, 1].
        seed: Seed of the initialisation, the data order and the sampled text.
    """

    method_name: ClassVar[str] = "Gated residual MLP memory"
    kind: ClassVar[MemoryPeftType] = MemoryPeftType("MEMORY_ADAPTER")

    layers: Sequence[int | float] | int | float = 0.18
    memory_dim: int = 128
    activation: str = "gelu"
    gate_init: float | None = None
    token_gate: str = "keys"
    key_threshold: float = 0.6
    key_ramp: float = 0.1
    router_keys: bool = False
    num_keys: int = field(default=0, metadata=STATE)
    stream_scale: bool = True
    norm_cap: float | None = None
    dropout: float = 0.0
    weight: float = 1.0
    learning_rate: float = field(default=1e-3, metadata=TRAINING)
    gate_learning_rate: float = field(default=1e-2, metadata=TRAINING)
    num_train_epochs: float = field(default=25, metadata=TRAINING)
    min_steps: int = field(default=100, metadata=TRAINING)
    target_loss: float = field(default=0.01, metadata=TRAINING)
    batch_size: int = field(default=4, metadata=TRAINING)
    warmup_steps: int = field(default=10, metadata=TRAINING)
    weight_decay: float = field(default=0.05, metadata=TRAINING)
    max_grad_norm: float = field(default=10.0, metadata=TRAINING)
    num_prefixes: int = field(default=5, metadata=TRAINING)
    max_length: int | None = field(default=None, metadata=TRAINING)
    locality_weight: float = field(default=0.0, metadata=TRAINING)
    distillation_weight: float = field(default=0.0, metadata=TRAINING)
    seed: int = field(default=0, metadata=TRAINING)
    target_modules: list[str] | None = field(default=None, repr=False, metadata=STATE)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.kind
        self.task_type = "CAUSAL_LM"
        self.target_modules = None  # resolved from `layers` at every injection
        self.layers = checked_layers(self.layers)
        check_number("memory_dim", self.memory_dim, low=1, integer=True)
        check_choice("activation", self.activation, ACT2FN.keys())
        # xielu is not even made, which would import a package of that name.
        if self.activation in ("prelu", "xielu") or list(ACT2FN[self.activation].parameters()):
            raise ValueError(f"`activation={self.activation!r}` has parameters of its own: choose one without.")
        check_choice("token_gate", self.token_gate, ("keys", "sigmoid", "none"))
        if self.gate_init is None:
            self.gate_init = 1.0 if self.token_gate == "keys" else 0.0
        check_number("gate_init", self.gate_init, low=float("-inf"))
        check_number("key_threshold", self.key_threshold, low=0, high=1, open_low=True)
        check_number("key_ramp", self.key_ramp, low=0, open_low=True)
        check_number("num_keys", self.num_keys, low=0, integer=True)
        check_flag("stream_scale", self.stream_scale)
        check_flag("router_keys", self.router_keys)
        if self.norm_cap is not None:
            check_number("norm_cap", self.norm_cap, low=0, open_low=True)
        check_number("dropout", self.dropout, low=0, high=0.999)
        check_number("weight", self.weight, low=float("-inf"))
        check_number("learning_rate", self.learning_rate, low=0, open_low=True)
        check_number("gate_learning_rate", self.gate_learning_rate, low=0)
        check_number("num_train_epochs", self.num_train_epochs, low=0, open_low=True)
        check_number("min_steps", self.min_steps, low=0, integer=True)
        check_number("target_loss", self.target_loss, low=0)
        check_number("batch_size", self.batch_size, low=1, integer=True)
        check_number("warmup_steps", self.warmup_steps, low=0, integer=True)
        check_number("weight_decay", self.weight_decay, low=0)
        check_number("max_grad_norm", self.max_grad_norm, low=0, open_low=True)
        check_number("num_prefixes", self.num_prefixes, low=0, integer=True)
        if self.max_length is not None:
            check_number("max_length", self.max_length, low=2, integer=True)
        check_number("locality_weight", self.locality_weight, low=0)
        check_number("distillation_weight", self.distillation_weight, low=0, high=1)
        check_number("seed", self.seed, low=0, integer=True)

    @property
    def depths(self) -> list[int | float]:
        """`layers` as the list that validation made of it."""
        assert isinstance(self.layers, list)
        return self.layers

    @property
    def has_keys(self) -> bool:
        """Whether blocks store keys of what was written."""
        return self.token_gate == "keys" or self.router_keys

    def resolve(self, decoder: Decoder) -> None:
        """Fill in block indices and their modules' names."""
        self.layers = resolve_layers(self.depths, decoder.num_layers)
        self.target_modules = [decoder.block_name(layer) for layer in self.layers]

    def tensor_shapes(self, decoder: Decoder) -> dict[str, torch.Size]:
        d, r, n = decoder.hidden_size, self.memory_dim, self.num_keys
        shapes = {
            "up": (r, d),
            "up_bias": (r,),
            "down": (d, r),
            "down_bias": (d,),
            "norm_weight": (d,),
            "norm_bias": (d,),
        }
        shapes["gate"] = (1,)
        if self.token_gate == "sigmoid":
            shapes |= {"gate_weight": (1, d), "gate_bias": (1,)}
        if self.has_keys:
            shapes |= {"keys": (n, d), "key_bias": (n,)}
        return {
            f"{decoder.block_name(layer)}.residual_memory.memory_adapter_mlp.{name}": torch.Size(shape)
            for layer in resolve_layers(self.depths, decoder.num_layers)
            for name, shape in shapes.items()
        }

    @classmethod
    def fever_experiment(cls, **settings: Any) -> MemoryAdapterConfig:
        """Return the FEVER experiment's module and depth: gate 1.0 at every token, absolute scale, blocks at 70–80%."""
        experiment: dict[str, Any] = dict(
            layers=(0.7, 0.8),
            gate_init=1.0,
            token_gate="none",
            stream_scale=False,
            gate_learning_rate=1e-3,
            num_prefixes=0,
            min_steps=0,
            target_loss=0.0,
        )
        return cls(**{**experiment, **settings})
