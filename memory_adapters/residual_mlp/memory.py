"""The gated residual MLP as a `Memory`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from transformers import TrainerCallback

from memory_adapters.base_model.exclusive import alone
from memory_adapters.items import as_items
from memory_adapters.memory import Memory
from memory_adapters.peft_layers.virtual_tokens import without_slots
from memory_adapters.report import WriteReport
from memory_adapters.residual_mlp.config import MemoryAdapterConfig
from memory_adapters.residual_mlp.layer import ResidualLayer, discard_empty_layers
from memory_adapters.residual_mlp.write import Writer, write

__all__ = ["ResidualMemory"]


class ResidualMemory(Memory):
    """Knowledge trained into gated residual MLPs on a few decoder blocks, the base frozen."""

    config: MemoryAdapterConfig
    export_note: ClassVar[str] = "Its MLP is not linear, so no LoRA and no weight can hold it: keep it as an adapter."

    @property
    def weight(self) -> float:
        """Factor on what the memory adds. Assign to blend memories; it is saved."""
        return self.config.weight

    @weight.setter
    def weight(self, value: float) -> None:
        self.config.weight = float(value)
        for layer in self.tuner_layers():
            assert isinstance(layer, ResidualLayer)
            layer.weights[self.adapter_name] = float(value)

    @alone
    @without_slots
    def write(
        self,
        items: Any,
        *,
        unrelated: Sequence[str] | None = None,
        training_args: Mapping[str, Any] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        resume_from_checkpoint: bool | str = False,
        progress: bool = True,
    ) -> WriteReport:
        """Learn facts, questions with answers, and documents by training the memory.

        A second write adds to the first, but trains the same MLP, so what was written earlier fades unless it is
        given again. Slots of other memories are not read meanwhile. If it fails or is interrupted, the memory is what
        it was before.

        Args:
            items: Strings (documents), `Document`, `Fact`, `QuestionAnswer`, mixed; one or many.
            unrelated: Texts that have nothing to do with the items: the memory learns to stay silent on them, and the
                report's perplexity is measured on a quarter of them. Sampled from the model if None.
            training_args: Fields of `transformers.TrainingArguments` that override the config's, such as
                `{"bf16": True}` or `{"output_dir": "run", "save_strategy": "epoch"}`.
            callbacks: Trainer callbacks.
            resume_from_checkpoint: Continue from the newest whole checkpoint in `output_dir`, or from the one named.
            progress: Show a bar.

        Returns:
            What was learned, and at what cost.

        Raises:
            TypeError: If an item is of no kind that can be written.
            ValueError: If there is no tokenizer, no item, or an item does not fit in the model's context.
        """
        self._check_writable()
        return write(
            self,
            as_items(items),
            unrelated=unrelated,
            overrides={"disable_tqdm": not progress, **(training_args or {})},
            callbacks=callbacks,
            resume=resume_from_checkpoint,
        )

    @alone
    @without_slots
    def fit_keys(self, items: Any, *, unrelated: Sequence[str] | None = None) -> int:
        """Only find the keys of `items`, for those who train the memory in a loop of their own.

        Returns:
            How many keys each block got.
        """
        self._check_writable()
        if not self.config.has_keys:
            raise ValueError(f"`token_gate={self.config.token_gate!r}` has no keys to fit; set `router_keys=True`.")
        with self._rollback_on_error():
            return Writer(self, as_items(items), unrelated).fit_keys()

    def _trained(self) -> Iterable[Tensor]:
        return self.state_dict().values()

    def _detach(self) -> None:
        self.active = False  # so that PEFT does not activate another adapter in its place
        for layer in self.tuner_layers():
            layer.delete_adapter(self.adapter_name)
        discard_empty_layers(self.model)
