"""Closed-form editing: an edit is a LoRA adapter and a ledger of its facts."""

from memory_adapters.memit.config import MemitConfig
from memory_adapters.memit.covariance import Covariance
from memory_adapters.memit.covariance_fitter import CovarianceFitter
from memory_adapters.memit.memory import MemitMemory
from memory_adapters.memit.tuner import EditTuner
from memory_adapters.peft_layers.refusing_tuner import register_with_peft
from memory_adapters.registry import Variant, register_method

__all__ = ["Covariance", "CovarianceFitter", "MemitConfig", "MemitMemory"]

register_with_peft(MemitConfig, MemitConfig.kind, EditTuner)
register_method(
    "memit",
    MemitConfig,
    MemitMemory,
    variants={
        **{solver: Variant({"solver": solver}) for solver in ("memit", "alphaedit", "emmet")},
        "gated_memit": Variant({"solver": "memit", "gate": "keys"}),
    },
)
