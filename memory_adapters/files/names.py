"""Names of the files of a saved memory."""

from __future__ import annotations

__all__ = ["CARD_FILE", "CONFIG_FILE", "CONFIG_FILES", "PEFT_KEY_PREFIX", "SETTINGS_FILE", "WEIGHTS_FILE"]

CONFIG_FILE = "adapter_config.json"
SETTINGS_FILE = "memory_config.json"  # of methods whose adapter has a PEFT type of PEFT's own, such as LORA
CONFIG_FILES = (SETTINGS_FILE, CONFIG_FILE)
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
PEFT_KEY_PREFIX = "base_model.model."
