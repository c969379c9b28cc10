"""Settings of the gated residual MLP memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers.activations import ACT2FN

from memory_adapters.base_model.decoder import Decoder, resolve_layers
from memory_adapters.config import STATE, TRAINING, MemoryPeftType
from memory_adapters.keys.thing_config import ThingConfig
from memory_adapters.validation import check_choice, check_flag, check_number, checked_layers

__all__ = ["MemoryAdapterConfig"]

# What fields that are None are, by `values`.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "mlp": dict(
        layers=0.18, activation="gelu", learning_rate=1e-3, num_train_epochs=25, warmup_steps=10, max_grad_norm=10.0,
        num_prefixes=5,
    ),
    "per_key": dict(
        layers=(0.4, 1.0), activation="linear", learning_rate=1e-2, num_train_epochs=2, warmup_steps=5,
        max_grad_norm=1.0, num_prefixes=2,
    ),
}  # fmt: skip


@dataclass
class MemoryAdapterConfig(ThingConfig):
    """Configure a gated residual MLP on the output x of chosen decoder blocks.

    With the defaults, at each token,

        x ← x + g(x) · gate · rms(x) · LayerNorm(W_down · act(W_up · n(x))),    n(x) = (x − mean) / std,

    where g(x) in [0, 1] opens only where x is near a key of what was written, and is exactly 0 elsewhere.
    `MemoryAdapterConfig.fever_experiment()` is the original x + gate · LayerNorm(W_down · act(W_up · x)).

    With `values="per_key"` each thing that is written about has hidden units of its own, on more blocks, which act from
    where a row meets a key of the thing on:

        x ← x + rms(x) · Σ_t g_t(x) · W_down,t · act(W_up,t · n(x)).

    Things are forgotten, and learned, one by one. See `ThingConfig` for the settings of keys and rows. Fields whose
    default is None have one that depends on `values`; see `DEFAULTS`.

    Attributes:
        values: `"mlp"` (one MLP for all that is written, trained anew with each write) or `"per_key"` (a few hidden
            units for each thing; `token_gate`, `gate_init`, `stream_scale`, `norm_cap`, `dropout`, `memory_dim`,
            `batch_size`, `min_steps`, `weight_decay` and the losses beside next-token loss are not used).
        layers: Block indices (negatives count from the top), a float in [0, 1] (the block at that depth), or two (a
            range of depth). Resolved to indices when the memory is injected.
        memory_dim: Hidden width of the MLP.
        units: Hidden units of each thing at each block, with `values="per_key"`.
        activation: Name of a transformers activation.
        gate_init: Start of the scalar gate. None for 1.0 with keys (a memory without keys is closed, so it still
            starts as the identity) and 0.0 otherwise (the identity, though open). The experiment's is 1.0.
        token_gate: `"keys"` (open near written keys, found in closed form by `write`), `"sigmoid"` (a linear router,
            trained), or `"none"` (open at every token).
        key_ramp: How far above the threshold the token gate reaches 1.
        router_keys: Keep keys also where the token gate uses none, so that `route_memories` can tell what was written.
        num_keys: Keys stored a block. Grows with `write`; leave it at 0.
        stream_scale: Read the normalised stream and add in units of its RMS, instead of absolute values.
        norm_cap: Largest norm of what is added, relative to the norm of x; None for no cap.
        dropout: Dropout after the activation, in training.
        weight: Factor on what the memory adds, for blending several memories.
        learning_rate: Peak learning rate (AdamW, cosine schedule) of the MLP.
        gate_learning_rate: Peak learning rate of the scalar gate and the sigmoid router, which have no weight decay.
        num_train_epochs: Most passes over the items, or over a thing's rows; small writes make `min_steps` steps.
        steps_per_epoch: Steps in a pass over a thing's rows, with `values="per_key"`.
        min_steps: Small writes make more passes, up to this many steps.
        target_loss: Training ends after an epoch whose mean loss is below this; 0 to make all passes.
        batch_size: Rows a step.
        warmup_steps: Steps of linear warm-up.
        weight_decay: AdamW's decoupled weight decay of the MLP.
        max_grad_norm: Gradient clipping.
        locality_weight: Weight of KL(base ‖ memory) on text that must not change: how the base continues each subject
            in other contexts, the prompts with other subjects, and unrelated text. 0 for none.
        distillation_weight: Share of the loss that is KL from the base model reading the item in its context, against
            next-token loss. In [0, 1].
    """

    method_name: ClassVar[str] = "Gated residual MLP memory"
    kind: ClassVar[MemoryPeftType] = MemoryPeftType("MEMORY_ADAPTER")

    values: str = "mlp"
    layers: Sequence[int | float] | int | float | None = None
    memory_dim: int = 128
    units: int = 4
    activation: str = None  # type: ignore[assignment]  # filled in, as all that are None
    gate_init: float | None = None
    token_gate: str = "keys"
    key_ramp: float = 0.1
    router_keys: bool = False
    num_keys: int = field(default=0, metadata=STATE)
    stream_scale: bool = True
    norm_cap: float | None = None
    dropout: float = 0.0
    weight: float = 1.0
    learning_rate: float = field(default=None, metadata=TRAINING)  # type: ignore[assignment]
    gate_learning_rate: float = field(default=1e-2, metadata=TRAINING)
    num_train_epochs: float = field(default=None, metadata=TRAINING)  # type: ignore[assignment]
    steps_per_epoch: int = field(default=7, metadata=TRAINING)
    min_steps: int = field(default=100, metadata=TRAINING)
    target_loss: float = field(default=0.01, metadata=TRAINING)
    batch_size: int = field(default=4, metadata=TRAINING)
    warmup_steps: int = field(default=None, metadata=TRAINING)  # type: ignore[assignment]
    weight_decay: float = field(default=0.05, metadata=TRAINING)
    max_grad_norm: float = field(default=None, metadata=TRAINING)  # type: ignore[assignment]
    num_prefixes: int = field(default=None, metadata=TRAINING)  # type: ignore[assignment]
    locality_weight: float = field(default=0.0, metadata=TRAINING)
    distillation_weight: float = field(default=0.0, metadata=TRAINING)
    target_modules: list[str] | None = field(default=None, repr=False, metadata=STATE)

    def __post_init__(self) -> None:
        check_choice("values", self.values, DEFAULTS)
        for name, value in DEFAULTS[self.values].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()
        self.peft_type = self.kind
        self.task_type = "CAUSAL_LM"
        self.target_modules = None  # resolved from `layers` at every injection
        self.layers = checked_layers(self.layers)
        check_number("memory_dim", self.memory_dim, low=1, integer=True)
        check_number("units", self.units, low=1, integer=True)
        check_choice("activation", self.activation, ACT2FN.keys())
        # xielu is not even made, which would import a package of that name.
        if self.activation in ("prelu", "xielu") or list(ACT2FN[self.activation].parameters()):
            raise ValueError(f"`activation={self.activation!r}` has parameters of its own: choose one without.")
        check_choice("token_gate", self.token_gate, ("keys", "sigmoid", "none"))
        if self.gate_init is None:
            self.gate_init = 1.0 if self.token_gate == "keys" else 0.0
        check_number("gate_init", self.gate_init, low=float("-inf"))
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
        check_number("steps_per_epoch", self.steps_per_epoch, low=1, integer=True)
        check_number("min_steps", self.min_steps, low=0, integer=True)
        check_number("target_loss", self.target_loss, low=0)
        check_number("batch_size", self.batch_size, low=1, integer=True)
        check_number("warmup_steps", self.warmup_steps, low=0, integer=True)
        check_number("weight_decay", self.weight_decay, low=0)
        check_number("max_grad_norm", self.max_grad_norm, low=0, open_low=True)
        check_number("locality_weight", self.locality_weight, low=0)
        check_number("distillation_weight", self.distillation_weight, low=0, high=1)

    @property
    def depths(self) -> list[int | float]:
        """`layers` as the list that validation made of it."""
        assert isinstance(self.layers, list)
        return self.layers

    @property
    def per_key(self) -> bool:
        """Whether each thing has values of its own."""
        return self.values == "per_key"

    @property
    def has_keys(self) -> bool:
        """Whether the MLPs of blocks store keys of what was written."""
        return not self.per_key and (self.token_gate == "keys" or self.router_keys)

    def resolve(self, decoder: Decoder) -> None:
        """Fill in block indices and their modules' names."""
        if self.per_key:
            self.resolve_key_layer(decoder)
        self.layers = resolve_layers(self.depths, decoder.num_layers)
        if self.per_key:
            self.check_above_keys(decoder, self.layers)
        self.target_modules = [decoder.block_name(layer) for layer in self.layers]

    def tensor_shapes(self, decoder: Decoder) -> dict[str, torch.Size]:
        d, r, n = decoder.hidden_size, self.memory_dim, self.num_keys
        if self.per_key:
            t, u = len(self.things), self.units
            shapes: dict[str, tuple[int, ...]] = {"inner": (t, u, d), "outer": (t, d, u)}
            reader = f"{decoder.block_name(self.block)}.key_reader.key_sets"
            keys = {f"{reader}.{name}": shape for name, shape in self.key_shapes(decoder).items()}
            return {**self._at_blocks(decoder, shapes), **keys}
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
        return self._at_blocks(decoder, shapes)

    def _at_blocks(self, decoder: Decoder, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Size]:
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
