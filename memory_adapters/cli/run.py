"""What a command works with: its model, its device, its result."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
import typer
from accelerate import PartialState
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from memory_adapters.cli.messages import say, wrong
from memory_adapters.embedded_model import embedded_model
from memory_adapters.files.atomic import atomic_file
from memory_adapters.training.distributed import is_main_process

__all__ = ["Run", "started"]

_GIVE = "give a folder with config.json, weights and a tokenizer, or the id of a model on the Hub"


class Run:
    """Give a command what it works with.

    Attributes:
        progress: Whether bars are shown.
    """

    def __init__(self, stdout: TextIO, device: torch.device, *, as_json: bool, progress: bool) -> None:
        self.progress = progress
        self._stdout, self._device, self._as_json = stdout, device, as_json

    def load_model(
        self, name: str, dtype: str, argument: str = "MODEL"
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load a model, on the device, and its tokenizer.

        Args:
            name: A folder, a Hub id, or `embedded`.
            dtype: Precision of its weights.
            argument: Where the name was given, for errors.

        Raises:
            OSError, ValueError: If there is no model or no tokenizer there; says which, and what to give.
        """
        if name == "embedded":
            with PartialState().main_process_first() if distributed.is_initialized() else nullcontext():
                name = str(embedded_model())  # the first process makes the folder
        _check_model_name(name, argument)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except OSError as error:
            raise _not_loaded(name, argument, error) from None
        except Exception as error:  # of any kind, by the kind of tokenizer that the model's config names
            raise ValueError(
                f"`{argument}={name}` has no tokenizer that can be loaded ({_sentence(error)}): put the model's own "
                f"there with `tokenizer.save_pretrained`, or {_GIVE}."
            ) from None
        if len(tokenizer) <= len(
            tokenizer.added_tokens_decoder
        ):  # made of the model's config alone, without a vocabulary
            raise ValueError(
                f"`{argument}={name}` has no tokenizer: put the model's own there with `tokenizer.save_pretrained`, or "
                f"{_GIVE}."
            )
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        except (OSError, ValueError) as error:
            raise _not_loaded(name, argument, error) from None
        model.to(self._device)  # type: ignore[arg-type]  # its decorator hides `self`
        return model, tokenizer

    def show(self, result: Mapping[str, Any], text: str) -> None:
        """Print the result on stdout: as JSON if that was asked for, else `text`."""
        if is_main_process():
            print(json.dumps(_finite(result)) if self._as_json else text, file=self._stdout)

    def save(self, result: Mapping[str, Any], path: Path) -> None:
        """Write the result as JSON. An existing file is replaced whole, or kept if this is interrupted."""
        if is_main_process():
            with atomic_file(path) as staging:
                staging.write_text(json.dumps(_finite(result), indent=1) + "\n", encoding="utf-8")

    def missed(self, why: str) -> NoReturn:
        """End with exit code 3: everything was done, but the result is not what was asked for."""
        say(why)
        raise typer.Exit(3)


@contextmanager
def started(*, as_json: bool, quiet: bool, device: str) -> Iterator[Run]:
    """Join the processes that were launched together, and yield what a command works with."""
    with ExitStack() as stack:
        launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized()
        if launched:
            PartialState(cpu=device == "cpu")
            stack.callback(distributed.destroy_process_group)
        progress = is_main_process() and not quiet
        if not progress:
            stack.enter_context(_no_bars())
        yield Run(sys.stdout, _device(device, launched), as_json=as_json, progress=progress)


def _check_model_name(name: str, argument: str) -> None:
    """Refuse a name that is neither a folder with a config nor like the id of a repository."""
    folder = Path(name)
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise FileNotFoundError(f"`{argument}={name}` has no config.json, so it is no model: {_GIVE}.")
    elif folder.exists():
        raise NotADirectoryError(f"`{argument}={name}` is a file, not a folder: {_GIVE}.")
    elif not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise FileNotFoundError(f"`{argument}={name}` does not exist: check its spelling, and {_GIVE}.")


def _not_loaded(name: str, argument: str, error: Exception) -> Exception:
    kind = OSError if isinstance(error, OSError) else ValueError
    if Path(name).is_dir():
        return kind(f"`{argument}={name}` cannot be loaded ({_sentence(error)}): {_GIVE}.")
    return kind(
        f"`{argument}={name}` is no folder here, and cannot be loaded from the Hub ({_sentence(error)}): check its "
        f"spelling and the connection, and {_GIVE}."
    )


def _sentence(error: Exception) -> str:
    """Return the first line of an error, without the sign at its end."""
    return str(error).strip().split("\n")[0].rstrip(".: ") or type(error).__name__


def _device(name: str, launched: bool) -> torch.device:
    if name == "auto":
        own = PartialState().device if launched else None
        return own or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise wrong("--device", f"{name!r} is no device; give auto, cpu, cuda, cuda:1 or mps.") from None


@contextmanager
def _no_bars() -> Iterator[None]:
    """Turn off the bars of transformers and huggingface_hub; ours are turned off where they are made."""
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _finite(value: Any) -> Any:
    """Return `value` with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
