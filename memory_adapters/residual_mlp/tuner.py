"""The PEFT tuner of the gated residual MLP."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NoReturn

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

from memory_adapters.base_model.decoder import execution_device, find_decoder
from memory_adapters.base_model.fingerprint import base_fingerprint, check_fingerprint
from memory_adapters.composition.activation import use_adapters_by_row
from memory_adapters.config import CHECKED
from memory_adapters.peft_layers.layers import adapter_layers
from memory_adapters.residual_mlp.config import MemoryAdapterConfig
from memory_adapters.residual_mlp.layer import PREFIX, ResidualLayer

__all__ = ["ResidualTuner"]


class ResidualTuner(BaseTuner):
    """Inject `ResidualLayer`s; `get_peft_model`, `add_adapter` and `inject_memory` all come through here."""

    prefix = PREFIX
    tuner_layer_cls = ResidualLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # type: ignore[misc]  # PEFT says no ClassVar

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        """Return a copy of the config with block indices, module names and the base's fingerprint filled in."""
        assert isinstance(peft_config, MemoryAdapterConfig)
        prepared = copy.deepcopy(peft_config)
        if prepared.__dict__.pop(CHECKED, None) != id(self.model):  # else `inject_memory` has resolved and checked it
            if prepared.per_key:
                raise ValueError(
                    '`values="per_key"` needs a gate that PEFT does not inject: call `inject_memory` or `load_memory`.'
                )
            decoder = find_decoder(self.model, peft_config.layers_path)
            prepared.resolve(decoder)
            fingerprint = base_fingerprint(self.model, decoder=decoder)
            if prepared.base_fingerprint is None:
                prepared.base_fingerprint = fingerprint
            check_fingerprint(prepared.base_fingerprint, fingerprint)
        for name, config in self.peft_config.items():
            if config is peft_config:
                self.peft_config[name] = prepared
        return prepared

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool:
        assert isinstance(peft_config, MemoryAdapterConfig)
        return key in (peft_config.target_modules or [])

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
        layer = ResidualLayer.attach(target, self.model.config.get_text_config().hidden_size)
        if adapter_name in layer.memory_adapter_mlp:
            raise ValueError(f"`adapter_name={adapter_name!r}` is taken; choose another or remove that memory first.")
        assert peft_config.target_modules is not None  # `resolve` filled it in
        position = peft_config.target_modules.index(current_key)
        layer.update_layer(adapter_name, peft_config, peft_config.seed + position, execution_device(target))
        layer.train(target.training)  # else its dropout would be on in a model that generates

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Take `adapter_names` given to `forward` and `generate`, as PEFT passes them."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
        else:
            with use_adapters_by_row(self.model, names):
                yield

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete a memory, and the layers that hold no other."""
        super().delete_adapter(adapter_name)
        _detach_empty_layers(self.model)

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT says None, and returns what this does
        self,
        merge: bool = True,
        progressbar: bool = True,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            _refuse_merge()
        for name in list(self.peft_config):
            for layer in adapter_layers(self.model, name):
                if isinstance(layer, ResidualLayer):
                    del layer.memory_adapter_mlp[name]
        _detach_empty_layers(self.model)
        del self.model.peft_config
        return self.model


def _detach_empty_layers(model: PreTrainedModel) -> None:
    for block in list(model.modules()):
        if ResidualLayer.child_name in block._modules and not ResidualLayer.of(block).memory_adapter_mlp:
            ResidualLayer.of(block).detach(block)


def _refuse_merge() -> NoReturn:
    raise NotImplementedError(
        "A residual memory is a nonlinear MLP and cannot be merged into the base weights. Keep it as an adapter "
        "(`save_pretrained`, `load_memory`), or write the facts with a method whose edit is a weight change."
    )


def register_with_peft() -> None:
    """Register the memory's type, config, tuner and prefix with PEFT."""
    kind: Any = MemoryAdapterConfig.kind
    PEFT_TYPE_TO_CONFIG_MAPPING[kind] = MemoryAdapterConfig
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = ResidualTuner
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = PREFIX
