"""Names of the files of a saved memory, and of the folders of several."""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath

__all__ = [
    "CARD_FILE",
    "CONFIG_FILE",
    "CONFIG_FILES",
    "PEFT_KEY_PREFIX",
    "SETTINGS_FILE",
    "WEIGHTS_FILE",
    "is_folder_name",
]

CONFIG_FILE = "adapter_config.json"
SETTINGS_FILE = "memory_config.json"  # of methods whose adapter has a PEFT type of PEFT's own, such as LORA
CONFIG_FILES = (SETTINGS_FILE, CONFIG_FILE)
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
PEFT_KEY_PREFIX = "base_model.model."


def is_folder_name(name: object) -> bool:
    """Return whether a name is that of one folder inside another, on every operating system."""
    if not isinstance(name, str) or not name.isprintable() or len(name.encode()) > 255 or name != name.strip():
        return False
    return name == PurePosixPath(name).name == PureWindowsPath(name).name and name not in ("", "..") and name[-1] != "."
