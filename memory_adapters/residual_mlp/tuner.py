"""The gated residual MLP as a PEFT tuner."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from memory_adapters.base_model.decoder import execution_device, find_decoder, resolve_layers
from memory_adapters.base_model.fingerprint import base_fingerprint, check_fingerprint
from memory_adapters.composition.activation import use_adapters_by_row
from memory_adapters.residual_mlp.config import MemoryAdapterConfig

if TYPE_CHECKING:
    pass

from memory_adapters.residual_mlp.layer import (
    CHILD,
    PREFIX,
    ResidualLayer,
    apply_memories,
    discard_empty_layers,
    residual_layers,
)

__all__ = ["ResidualTuner"]


class ResidualTuner(BaseTuner):
    """Injects `ResidualLayer`s; `get_peft_model`, `add_adapter` and `inject_memory` all come through here."""

    prefix = PREFIX
    tuner_layer_cls = ResidualLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        """A copy of the config with block indices, module names and the base's fingerprint filled in."""
        assert isinstance(peft_config, MemoryAdapterConfig)
        decoder = find_decoder(self.model, peft_config.layers_path)
        prepared = copy.deepcopy(peft_config)
        prepared.layers = resolve_layers(peft_config.depths, decoder.num_layers)
        prepared.target_modules = [decoder.block_name(layer) for layer in prepared.layers]
        fingerprint = base_fingerprint(self.model, peft_config.layers_path)
        if prepared.base_fingerprint is None:
            prepared.base_fingerprint = fingerprint
        else:
            check_fingerprint(prepared.base_fingerprint, fingerprint)
        for name, config in self.peft_config.items():
            if config is peft_config:
                self.peft_config[name] = prepared
        return prepared

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool:
        return key in peft_config.target_modules

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, MemoryAdapterConfig)
        if CHILD not in target._modules:
            hidden_size = find_decoder(self.model, peft_config.layers_path).hidden_size
            target.add_module(CHILD, ResidualLayer(hidden_size))
            target.register_forward_hook(apply_memories, prepend=True)
        layer = getattr(target, CHILD)
        if adapter_name in layer.memory_adapter_mlp:
            raise ValueError(f"`adapter_name={adapter_name!r}` is taken; choose another or remove that memory first.")
        position = peft_config.target_modules.index(current_key)
        layer.update_layer(adapter_name, peft_config, peft_config.seed + position, execution_device(target))
        layer.train(target.training)  # else its dropout would be on in a model that generates

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's way to pass `adapter_names` to `forward` and `generate`."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
        else:
            with use_adapters_by_row(self.model, names):
                yield

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        discard_empty_layers(self.model)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            _refuse_merge()
        for name in list(self.peft_config):
            for layer in residual_layers(self.model):
                if name in layer.memory_adapter_mlp:
                    del layer.memory_adapter_mlp[name]
        discard_empty_layers(self.model)
        del self.model.peft_config
        return self.model


def _refuse_merge() -> NoReturn:
    raise NotImplementedError(
        "A residual memory is a nonlinear MLP and cannot be merged into the base weights. Keep it as an adapter "
        "(`save_pretrained`, `load_memory`), or write the facts with a method whose edit is a weight change."
    )


def register_with_peft() -> None:
    """Teach PEFT the memory's type, config, tuner and prefix."""
    kind: Any = MemoryAdapterConfig.kind
    PEFT_TYPE_TO_CONFIG_MAPPING[kind] = MemoryAdapterConfig
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = ResidualTuner
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = PREFIX
