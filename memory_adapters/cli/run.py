"""Run a command: load its model, print its result, and end with its exit code."""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
import typer
from accelerate import PartialState
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from memory_adapters.embedded_model import embedded_model
from memory_adapters.files.atomic import atomic_file
from memory_adapters.training.distributed import is_main_process

__all__ = ["Run", "running", "wrong"]

_EXPECTED = (ValueError, TypeError, OSError, RuntimeError, ImportError)  # whose messages need no traceback


class Run:
    """Give a command what it works with.

    Attributes:
        progress: Whether bars are shown.
    """

    def __init__(self, stdout: TextIO, device: torch.device, *, as_json: bool, progress: bool) -> None:
        self.progress = progress
        self._stdout, self._device, self._as_json = stdout, device, as_json

    def load_model(self, name: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load a model, on the device, and its tokenizer."""
        if name == "embedded":
            with PartialState().main_process_first() if distributed.is_initialized() else nullcontext():
                name = str(embedded_model())  # the first process makes the folder
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        model.to(self._device)  # type: ignore[arg-type]  # its decorator hides `self`
        return model, AutoTokenizer.from_pretrained(name)

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


def wrong(option: str, why: str) -> typer.BadParameter:
    """Return the error for wrong usage of an option or argument: exit code 2."""
    return typer.BadParameter(why, param_hint=option)


def say(message: str) -> None:
    """Print a line on stderr."""
    who = "" if is_main_process() else f"process {PartialState().process_index}: "  # type: ignore[has-type]  # set in untyped code
    print(f"{who}{message}", file=sys.stderr)


@contextmanager
def running(*, as_json: bool, quiet: bool, debug: bool, device: str = "cpu") -> Iterator[Run]:
    """Print to stderr within this context, and end the program with an exit code after a failure.

    Under `accelerate launch` or `torchrun` the processes work together, and only the first prints.
    """
    with ExitStack() as stack:
        try:
            launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized()
            if launched:
                PartialState(cpu=device == "cpu")
                stack.callback(distributed.destroy_process_group)
            progress = is_main_process() and not quiet
            if not progress:
                stack.enter_context(_no_bars())
            run = Run(sys.stdout, _device(device, launched), as_json=as_json, progress=progress)
            with redirect_stdout(sys.stderr):
                yield run
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(130) from None
        except Exception as error:
            if debug:
                traceback.print_exc()
            notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
            kind = "" if isinstance(error, _EXPECTED) and str(error) else f"{type(error).__name__}: "
            say(f"error: {kind}{error}{notes}" + ("" if debug or not kind else " (--debug shows where)"))
            raise typer.Exit(1) from None


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
