"""The commands, with their arguments and options.

What does the work is imported when a command runs: help and wrong usage need neither torch nor PEFT, whose imports take
seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memory_adapters.cli.messages import wrong
from memory_adapters.cli.options import (
    BASELINES,
    COVARIANCE_TOKENS,
    METHODS,
    TAUGHT_WITH,
    TEXT_TOKENS,
    AdapterArgument,
    BaseModelOption,
    DebugOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    LimitOption,
    ModelArgument,
    OptionalModelArgument,
    PrivateOption,
    PushOption,
    QuietOption,
    RecordsArgument,
    ReportOption,
    TextOption,
    TextTokensOption,
    ThingsOption,
)
from memory_adapters.cli.running import running

__all__ = ["compare", "covariance", "demo", "evaluate", "export", "info", "trace", "write"]


def write(
    model: ModelArgument,
    items: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            metavar="ITEMS",
            help="What to write: a .json list, a .jsonl or a .csv file with the fields prompt, subject and target, or "
            "question and answer, or text; rows of KnowEdit, EasyEdit, CounterFact or zsRE; or a .txt file as one "
            "document. Not every method takes all kinds.",
        ),
    ],
    output: Annotated[
        Path, typer.Option(file_okay=False, metavar="FOLDER", help="Where to save; holds no other memory yet.")
    ],
    method: Annotated[
        str | None,
        typer.Option(metavar="METHOD", help=f"One of {', '.join(METHODS)}. Needed without --adapter."),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="ADAPTER", help="Write more into this saved memory (a folder, which may be --output, or a Hub id)."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A field of the method's config, as JSON or else as a string; repeat for several.",
        ),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            metavar="NAME=VALUE",
            help="An option of the method's write, as JSON or else as a string; repeat for several.",
        ),
    ] = None,
    min_recall: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="End with exit code 3 if a smaller share of facts and questions is recalled."),
    ] = None,
    push: PushOption = None,
    private: PrivateOption = False,
    base_model: BaseModelOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Write ITEMS into a memory for MODEL, and save it."""
    if method is None and adapter is None:
        raise wrong("--method", f"give one of {', '.join(METHODS)}, or a memory with --adapter.")
    if private and push is None:
        raise wrong("--private", "it is for --push, which is not given.")
    if base_model is not None and push is None:
        raise wrong("--base-model", "it is for --push, which is not given.")
    with running(as_json=as_json, quiet=quiet, debug=debug, device=device) as run:
        from memory_adapters.cli.write import write_items

        write_items(
            run,
            model,
            items,
            output,
            method=method,
            adapter=adapter,
            settings=settings or [],
            options=options or [],
            min_recall=min_recall,
            push=push,
            private=private,
            base_model=base_model,
            dtype=dtype,
        )


def evaluate(
    model: ModelArgument,
    adapter: AdapterArgument,
    records: RecordsArgument = None,
    things: ThingsOption = None,
    limit: LimitOption = None,
    text: TextOption = None,
    text_tokens: TextTokensOption = TEXT_TOKENS,
    per_item: Annotated[
        bool,
        typer.Option(
            "--per-item", help="Also a line for each fact and question: what MODEL says, and whether it is the target."
        ),
    ] = False,
    output: ReportOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Score MODEL on RECORDS without and with the memory ADAPTER.

    ES, PS, NS: share of prompts, paraphrases and neighbours on which the wanted answer is likelier than the other; S:
    their harmonic mean; exact: greedy decoding gives the target; tokens: share of its tokens that are the first choice.
    Own words: chat answers to questions in other words that name the target; same: chat answers about other things that
    stay as they were; leak: those that now name a target; spill: chat answers to other questions about the same
    subjects that now name their target. All in % (in JSON: shares in [0, 1]). The perplexity is on --text, or else on
    the sentences that `write` reports on.
    """
    with running(as_json=as_json, quiet=quiet, debug=debug, device=device) as run:
        from memory_adapters.cli.evaluate import evaluate_memory

        evaluate_memory(
            run,
            model,
            adapter,
            records,
            things=things,
            limit=limit,
            text=text,
            text_tokens=text_tokens,
            per_item=per_item,
            output=output,
            dtype=dtype,
        )


def compare(
    model: ModelArgument,
    records: RecordsArgument = None,
    things: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|builtin",
            help="Things with several facts each, and questions about them in other words and about what follows, in a "
            ".json or .jsonl file; `builtin` for invented ones. Beside RECORDS they are written by themselves; without "
            "RECORDS their facts are the records, and --limit counts things.",
        ),
    ] = None,
    things_limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Beside RECORDS: only the first N things.  [default: all]")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help=f"Some of {', '.join(BASELINES)}, separated by commas; nothing always comes first.  [default: "
            "all but those that need a --start which is not given]",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="METHOD.NAME=VALUE",
            help="A field of a method's config, such as memit.precision=bfloat16, an option of its write, or of "
            "the training of lora and full; repeat for several. A method's name sets it for all of its variants.",
        ),
    ] = None,
    starts: Annotated[
        list[str] | None,
        typer.Option(
            "--start",
            metavar="METHOD=ADAPTER",
            help="A saved memory that the method's variants start from, such as a trained slot encoder: a folder or a "
            "Hub id; repeat for several.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Compare on the first N records.  [default: all]")
    ] = None,
    fact_counts: Annotated[
        str | None,
        typer.Option(
            metavar="COUNTS",
            help="Curves: score and perplexity with the first so many records, such as 1,10,100, beyond --limit too.",
        ),
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="With --fact-counts: leave out a number of facts that a method would take longer to write, by what "
            "its next smaller number took.",
        ),
    ] = None,
    documents: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Texts with questions and answers, written by themselves and asked about in a chat: .json or .jsonl "
            "with text, questions and answers.",
        ),
    ] = None,
    documents_limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the first N of them.  [default: all]")
    ] = None,
    portability: Annotated[
        str | None,
        typer.Option(
            metavar="RECORDS", help="zsRE with questions about what follows from its facts, written by themselves."
        ),
    ] = None,
    portability_limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the first N of them.  [default: as --limit]")
    ] = None,
    choices: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Multiple-choice questions for general ability: with question, choices and answer (an index), or "
            "CounterFact's known_1000.json.",
        ),
    ] = None,
    choices_limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the first N of them.  [default: all]")
    ] = None,
    fluency: Annotated[
        int, typer.Option(min=0, metavar="N", help="Generate texts of 100 tokens from N prompts, for fluency.")
    ] = 0,
    text: TextOption = None,
    text_tokens: TextTokensOption = TEXT_TOKENS,
    folder: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            metavar="FOLDER",
            help="Store every result here as soon as it is there, and resume from them; then tables and plots.",
        ),
    ] = None,
    only_stored: Annotated[
        bool, typer.Option("--only-stored", help="With --folder: measure nothing, show what is stored.")
    ] = False,
    output: ReportOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare the methods, and what else gives a model facts, on those of RECORDS.

    Each in turn writes the facts, is scored, and is taken out again; what it costs is measured too. The perplexity is
    on --text, or else on the held-out sentences that `write` reports on.
    """
    counts = _fact_counts(fact_counts)
    with running(as_json=as_json, quiet=quiet, debug=debug, device=device) as run:
        from memory_adapters.cli.compare import compare_methods

        compare_methods(
            run,
            model,
            records,
            things=things,
            things_limit=things_limit,
            methods=methods,
            settings=settings or [],
            starts=starts or [],
            limit=limit,
            fact_counts=counts,
            max_seconds=max_seconds,
            documents=documents,
            documents_limit=documents_limit,
            portability=portability,
            portability_limit=portability_limit,
            choices=choices,
            choices_limit=choices_limit,
            fluency=fluency,
            text=text,
            text_tokens=text_tokens,
            folder=folder,
            only_stored=only_stored,
            output=output,
            dtype=dtype,
            debug=debug,
        )


def _fact_counts(given: str | None) -> list[int]:
    try:
        counts = [] if given is None else [int(number) for number in given.split(",")]
    except ValueError:
        counts = [0]
    if any(count < 1 for count in counts):
        raise wrong("--fact-counts", f"{given!r} must be counts of facts from 1 up, such as 1,10,100.")
    return counts


def trace(
    model: ModelArgument,
    facts: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            metavar="FACTS",
            help="A .json list, a .jsonl or a .csv file with prompt, subject and target; or the paper's known_1000.",
        ),
    ],
    output: Annotated[Path, typer.Option(dir_okay=False, metavar="FILE.json", help="Where to save the table.")],
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, metavar="FILE.png", help="Also draw it (.png, .svg, .pdf).")
    ] = None,
    limit: LimitOption = None,
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Draws of the noise a fact.")] = 10,
    every: Annotated[bool, typer.Option("--all", help="Trace also facts that the model does not know.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Find the layers where MODEL recalls facts.

    By causal tracing; on a CPU a fact takes minutes.
    """
    with running(as_json=as_json, quiet=quiet, debug=debug, device=device) as run:
        from memory_adapters.cli.trace import trace_layers

        trace_layers(run, model, facts, output, plot=plot, limit=limit, samples=samples, every=every, dtype=dtype)


def covariance(
    model: ModelArgument,
    output: Annotated[
        Path, typer.Option(dir_okay=False, metavar="FILE", help="Where to save it, such as c0.safetensors.")
    ],
    texts: Annotated[
        Path | None,
        typer.Argument(
            exists=True,
            dir_okay=False,
            metavar="TEXTS",
            help="A text file, a paragraph a line.  [default: text that the model samples]",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to read or sample.")] = COVARIANCE_TOKENS,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="LAYERS",
            help="Blocks, as 6,7,8, or a range of depth, as 0.2,0.35.  [default: those MemitConfig edits]",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False, metavar="FILE", help="With TEXTS: keep the state here, and go on from it if it exists."
        ),
    ] = None,
    push: PushOption = None,
    private: PrivateOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Fit the covariance that `write --option covariance=FILE` takes.

    It is of the keys that MODEL has in ordinary text: what an edit by memit must leave alone.
    """
    if checkpoint is not None and texts is None:
        raise wrong("--checkpoint", "it is for TEXTS, which are not given.")
    if private and push is None:
        raise wrong("--private", "it is for --push, which is not given.")
    with running(as_json=as_json, quiet=quiet, debug=debug, device=device) as run:
        from memory_adapters.cli.covariance import fit_covariance

        fit_covariance(
            run,
            model,
            texts,
            output,
            tokens=tokens,
            layers=layers,
            checkpoint=checkpoint,
            push=push,
            private=private,
            dtype=dtype,
        )


def export(
    adapter: AdapterArgument,
    model: Annotated[str, typer.Option(metavar="MODEL", help="The model that the memory was written for.")],
    file_format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="One that the memory's method offers, such as vllm (a LoRA adapter for servers), gguf (a LoRA file "
            "for llama.cpp) or merged (the whole model). Another is an error that names those.",
        ),
    ],
    output: Annotated[Path, typer.Option(file_okay=False, metavar="FOLDER", help="Where to save it.")],
    dtype: Annotated[
        Dtype, typer.Option(help="Precision of the exported tensors; auto is the format's own default.")
    ] = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Save the memory ADAPTER in a format that other programs load."""
    with running(as_json=as_json, quiet=quiet, debug=debug, device=device) as run:
        from memory_adapters.cli.export import export_memory

        export_memory(run, adapter, model, file_format, output, dtype=dtype)


def info(
    adapter: AdapterArgument,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Also load this model, and say whether the memory fits it.")
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Describe the saved memory ADAPTER.

    Read from its files; no model is loaded unless --model names one.
    """
    with running(as_json=as_json, quiet=quiet, debug=debug, device=device) as run:
        from memory_adapters.cli.info import describe

        describe(run, adapter, model, dtype=dtype)


def demo(
    model: OptionalModelArgument = "embedded",
    method: Annotated[
        str,
        typer.Option(metavar="METHOD", help=f"What to teach with at first: auto, or one of {', '.join(TAUGHT_WITH)}."),
    ] = "auto",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, metavar="PORT", help="[default: the first free one from 7860]")
    ] = None,
    share: Annotated[
        bool,
        typer.Option(
            "--share",
            help="Also give the page a public address, by Gradio's servers; without fields to save, load and push.",
        ),
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Open a page to teach MODEL facts, and to ask it with and without them.

    The page is served on this machine alone, until Ctrl-C. Needs `pip install "memory-adapters[demo]"`.
    """
    with running(as_json=False, quiet=quiet, debug=debug, device=device) as run:
        from memory_adapters.cli.demo import serve_page

        serve_page(run, model, method=method, port=port, share=share, dtype=dtype)
