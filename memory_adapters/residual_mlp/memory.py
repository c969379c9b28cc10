"""The gated residual MLP as a `Memory`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformers import TrainerCallback

from memory_adapters.base_model.exclusive import exclusive_use
from memory_adapters.base_model.item_rows import Row, ScoredRow, plain_rows
from memory_adapters.base_model.modes import own_settings
from memory_adapters.items import Item, Items, as_items
from memory_adapters.memory import Memory, Outcome
from memory_adapters.peft_layers.rollback import Restore, rollback_on_error, saved_attributes, saved_tensors
from memory_adapters.residual_mlp.config import MemoryAdapterConfig
from memory_adapters.residual_mlp.layer import residual_layers
from memory_adapters.residual_mlp.write import Writer, longest_row, write
from memory_adapters.training.trainer import check_training_options

__all__ = ["ResidualMemory"]


class ResidualMemory(Memory[MemoryAdapterConfig]):
    """Train knowledge into gated residual MLPs on a few decoder blocks, the base frozen.

    A second `write` trains the same MLP, and items of earlier writes again with the new ones: else they would fade.

    Options of `write`:
        unrelated (`Sequence[str]`): Texts that have nothing to do with the items: the memory learns to stay closed on
            them. Sampled from the model by default.
        training_args (`Mapping[str, Any]`): Fields of `transformers.TrainingArguments` that the config does not have,
            such as `{"bf16": True}` or `{"output_dir": "run", "save_strategy": "epoch"}`.
        callbacks (`Sequence[TrainerCallback]`): Trainer callbacks.
        resume_from_checkpoint (`bool` or `str`): Continue from the newest complete checkpoint in `output_dir`, or from
            the one named.
    """

    export_note: ClassVar[str] = (
        "Its MLP is not linear, so no LoRA and no weight can hold it: keep it as an adapter (`save_pretrained`)."
    )

    @property
    def weight(self) -> float:
        """Factor on what the memory adds. Assign to blend memories; it is saved."""
        return self.config.weight

    @weight.setter
    def weight(self, value: float) -> None:
        self.config.weight = float(value)
        for layer in residual_layers(self):
            layer.weights[self.adapter_name] = float(value)

    def _check_items(self, items: Sequence[Item], **options: Any) -> tuple[Sequence[Item], list[str]]:
        remedy = "set `memory.config.{field} = {value!r}` before `write` instead"
        check_training_options(options, remedy)
        return items, []

    def _rows(self, items: Sequence[Item]) -> Sequence[ScoredRow]:
        return plain_rows(items, self._require_tokenizer(), longest_row(self.model, self._config))

    def _write(
        self,
        items: Sequence[Item],
        rows: Sequence[Row],
        *,
        progress: bool,
        unrelated: Sequence[str] | None = None,
        training_args: Mapping[str, Any] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        resume_from_checkpoint: bool | str = False,
    ) -> Outcome:
        arguments = {"disable_tqdm": not progress, **(training_args or {})}
        resume = resume_from_checkpoint
        return write(
            self,
            items,
            earlier=self._kept(items),
            unrelated=unrelated,
            training_args=arguments,
            callbacks=callbacks,
            resume=resume,
        )

    def fit_keys(self, items: Items, *, unrelated: Sequence[str] | None = None) -> int:
        """Find the keys of `items` alone, for those who train the memory in a loop of their own.

        Returns:
            How many keys each block got.
        """
        listed = as_items(items, self.accepts)
        with exclusive_use(self.model), own_settings():
            self._check_writable()
            if not self._config.has_keys:
                raise ValueError(
                    f"`token_gate={self._config.token_gate!r}` has no keys to fit; set `router_keys=True`."
                )
            with self._taking_part(), rollback_on_error(*self._saved_state()):
                return Writer(self, listed, unrelated).fit_keys()

    def _saved_state(self) -> list[Restore]:
        modules = [layer.mlp(self.adapter_name) for layer in residual_layers(self)]
        buffers = [dict(module._buffers) for module in modules]

        def restore_keys() -> None:  # they are replaced, not written into
            for module, own in zip(modules, buffers, strict=True):
                module._buffers.update(own)

        tensors = [tensor for module in modules for tensor in module.parameters()]
        return [saved_attributes(self, self._config), saved_tensors(tensors), restore_keys]
