"""Arguments and options that several commands share, and what their help and defaults name.

METHODS, TAUGHT_WITH, BASELINES and COVARIANCE_TOKENS repeat what the library says, which help does not import; tests
compare them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

METHODS = ("gated_lora", "memit", "slots", "residual")
TAUGHT_WITH = ("slots", "gated_memit", "gated_lora", "per_key", "residual", "memit")
BASELINES = (
    "gated_lora",
    "memit",
    "alphaedit",
    "emmet",
    "gated_memit",
    "encoder",
    "slots",
    "retrieval",
    "message",
    "refined",
    "prompt",
    "residual",
    "per_key",
    "lora",
    "lora_slow",
    "lora_rehearsed",
    "full",
    "nothing",
)
COVARIANCE_TOKENS = 16_384
TEXT_TOKENS = 10_000

Dtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Causal LM: a Hub id, a folder, or `embedded` for SmolLM2-135M-Instruct (./embedded is a folder).",
    ),
]
OptionalModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Causal LM: a Hub id, a folder, or `embedded`."),
]
AdapterArgument = Annotated[str, typer.Argument(metavar="ADAPTER", help="Saved memory: a folder or a Hub id.")]
RecordsArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="RECORDS",
        help="Facts with prompts to judge them by, in a .json, .jsonl or .csv file, or a Hub id: CounterFact, zsRE, "
        "KnowEdit, EasyEdit, or your own with the fields prompt, subject, target and, optionally, true_target, "
        "paraphrases, neighbours.",
    ),
]
ThingsOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|builtin",
        help="Instead of RECORDS: things with several facts each and questions about them in other words, in a .json "
        "or .jsonl file; `builtin` for invented ones. --limit counts things.",
    ),
]
LimitOption = Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first N records.  [default: all]")]
TextOption = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        metavar="FILE",
        help="Unrelated text for the perplexity.  [default: held-out sentences]",
    ),
]
TextTokensOption = Annotated[int, typer.Option(min=2, metavar="N", help="Most tokens of --text that are read.")]
ReportOption = Annotated[Path | None, typer.Option(dir_okay=False, metavar="FILE.json", help="Also save the result.")]
PushOption = Annotated[
    str | None, typer.Option(metavar="REPO_ID", help="Also upload to this Hub repository, made if need be.")
]
BaseModelOption = Annotated[
    str | None,
    typer.Option(metavar="REPO_ID", help="With --push: the Hub id of MODEL, where MODEL is a local folder."),
]
PrivateOption = Annotated[
    bool, typer.Option("--private", help="With --push: a new repository is private.  [default: as the account says]")
]
DtypeOption = Annotated[Dtype, typer.Option(help="Precision of the model's weights; auto is that of its files.")]
DeviceOption = Annotated[
    str, typer.Option(metavar="DEVICE", help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]
