"""Names of the files that a saved memory has."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


CONFIG_FILE = "adapter_config.json"
SETTINGS_FILE = "memory_config.json"  # of methods whose adapter is of a PEFT type that is not their own
CONFIG_FILES = (SETTINGS_FILE, CONFIG_FILE)
WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_KEY_PREFIX = "base_model.model."
