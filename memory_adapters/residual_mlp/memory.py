"""The gated residual MLP as a `Memory`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import TrainerCallback

from memory_adapters.base_model.decoder import Decoder, execution_device, find_decoder
from memory_adapters.base_model.exclusive import exclusive_use
from memory_adapters.base_model.item_rows import Row, ScoredRow, plain_rows
from memory_adapters.base_model.modes import own_settings
from memory_adapters.base_model.seeding import seeded
from memory_adapters.items import Item, Items, as_items
from memory_adapters.keys.learning import learn_keys
from memory_adapters.keys.thing_memory import Learned, ThingMemory, Values
from memory_adapters.keys.things import Thing
from memory_adapters.memory import Memory, Outcome
from memory_adapters.peft_layers.rollback import Restore, rollback_on_error, saved_attributes, saved_tensors
from memory_adapters.residual_mlp.config import MemoryAdapterConfig
from memory_adapters.residual_mlp.layer import residual_layers
from memory_adapters.residual_mlp.thing_training import thing_mlps, train_units
from memory_adapters.residual_mlp.write import Writer, longest_row, write
from memory_adapters.training.trainer import check_training_options

__all__ = ["ResidualMemory"]


class ResidualMemory(ThingMemory[MemoryAdapterConfig]):
    """Train knowledge into gated residual MLPs on a few decoder blocks, the base frozen.

    A second `write` trains the same MLP, and items of earlier writes again with the new ones: else they would fade.
    With `values="per_key"` each thing has hidden units of its own: a second write leaves those of other things as they
    are, and what is forgotten leaves no trace.

    Options of `write`:

    * `unrelated` (`Sequence[str]`): Texts that have nothing to do with the items: the memory learns to stay closed on
      them. Sampled from the model by default.

    Further options, with `values="mlp"`:

    * `training_args` (`Mapping[str, Any]`): Fields of `transformers.TrainingArguments` that the config does not have,
      such as `{"bf16": True}` or `{"output_dir": "run", "save_strategy": "epoch"}`.
    * `callbacks` (`Sequence[TrainerCallback]`): Trainer callbacks.
    * `resume_from_checkpoint` (`bool` or `str`): Continue from the newest complete checkpoint in `output_dir`, or from
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

    def _attach(self, decoder: Decoder) -> None:
        if self._config.per_key:
            reader = self._attach_gate(decoder)
            for module in thing_mlps(self).values():
                module.read_by(reader, self.adapter_name)

    def _try_model(self, decoder: Decoder) -> None:
        if not self._config.per_key:
            super()._try_model(decoder)
            return
        before = self._values()
        self._set_values({block: own.with_more(_zeros(own)).things([-1]) for block, own in before.items()})
        try:
            self._try_gate(decoder, 'That needs `values="mlp"`.')
        finally:
            self._set_values(before)

    def _check_items(self, items: Sequence[Item], **options: Any) -> tuple[Sequence[Item], list[str]]:
        if self._config.per_key and (
            given := sorted(name for name in options if name != "unrelated" and options[name])
        ):
            raise ValueError(f'`{given[0]}` is an option of memories with `values="mlp"`: leave it out.')
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
        if self._config.per_key:
            return self._write_things(items, progress=progress, unrelated=unrelated)
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

    def _learn(self, things: Sequence[Thing], *, unrelated: Sequence[str] | None, progress: bool) -> Learned:
        decoder = find_decoder(self.model, self._config.layers_path)
        with seeded(self._config.seed):
            keys, rows = learn_keys(self, decoder, things, unrelated=unrelated, progress=progress)
            values, losses = train_units(self, decoder, rows, progress=progress)
        return Learned(keys, values, losses)

    def _values(self) -> dict[str, Values]:
        return {block: module.values for block, module in thing_mlps(self).items()}

    def _set_values(self, values: Mapping[str, Values]) -> None:
        for block, module in thing_mlps(self).items():
            module.values = values[block]

    def forget(self, items: Items) -> None:
        """Take items out again, with `values="per_key"`; see `ThingMemory.forget`.

        Raises:
            NotImplementedError: If all that is written shares one MLP.
            ValueError: If an item is not written.
        """
        if self._config.per_key:
            super().forget(items)
        else:
            Memory.forget(self, items)

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

    def _acts(self, ids: Sequence[int]) -> dict[str, list[float]] | None:
        if self._config.per_key:
            return super()._acts(ids)
        if self._config.token_gate == "none":
            return None
        states: list[Tensor] = []
        layers = residual_layers(self)
        device = execution_device(find_decoder(self.model, self._config.layers_path).embeddings)
        handles = [layer.register_forward_pre_hook(lambda _, args: states.append(args[0])) for layer in layers]
        try:
            self.model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        gates = [layer.mlp(self.adapter_name).token_gate(x.float()) for layer, x in zip(layers, states, strict=True)]
        blocks = cast("Sequence[int]", self._config.layers)
        return {
            f"block {block}": gate[0, :, 0].tolist()
            for block, gate in zip(sorted(blocks), gates, strict=True)
            if gate is not None and bool((gate > 0).any())
        }

    def _saved_state(self) -> list[Restore]:
        if self._config.per_key:
            values = self._values()
            return [saved_attributes(self, self._config), self._keys().saved(), lambda: self._set_values(values)]
        modules = [layer.mlp(self.adapter_name) for layer in residual_layers(self)]
        buffers = [dict(module._buffers) for module in modules]

        def restore_keys() -> None:  # they are replaced, not written into
            for module, own in zip(modules, buffers, strict=True):
                module._buffers.update(own)

        tensors = [tensor for module in modules for tensor in module.parameters()]
        return [saved_attributes(self, self._config), saved_tensors(tensors), restore_keys]


def _zeros(values: Values) -> Values:
    """Return values of one thing that change nothing."""
    return Values(*(part.new_zeros(1, *part.shape[1:]) for part in (values.inner, values.outer)))
