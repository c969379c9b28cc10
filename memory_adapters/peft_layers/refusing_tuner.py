"""A PEFT tuner for methods that PEFT cannot put on a model by itself: it says what does."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner

__all__ = ["RefusingTuner", "register_with_peft"]


class RefusingTuner(BaseTuner):
    """Refuse to be made: `get_peft_model`, `add_adapter`, `from_pretrained` and `load_adapter` come through here.

    Attributes:
        refusal: The error's message, with the remedy.
    """

    refusal: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(self.refusal)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(self.refusal)


def register_with_peft(config_class: type[PeftConfig], kind: str, tuner: type[BaseTuner]) -> None:
    """Let PEFT and transformers read saved configs of this `peft_type`, and meet this tuner."""
    types: list[tuple[Any, Any]] = [
        (PEFT_TYPE_TO_CONFIG_MAPPING, config_class),
        (PEFT_TYPE_TO_TUNER_MAPPING, tuner),
        (PEFT_TYPE_TO_PREFIX_MAPPING, f"{kind.lower()}_"),
    ]
    for mapping, value in types:
        mapping[kind] = value
