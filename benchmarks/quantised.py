"""The same facts taught to a model in float32 and quantised to 4 bits, by each method.

    python benchmarks/quantised.py --data FOLDER [--records 20] [--output FILE]

FOLDER holds counterfact/edit.json and wikitext2/test.txt. The 4-bit model is bitsandbytes' NF4 of the same weights.
Each method is scored beside its own base in the same process. Results are added to the JSON file, so a run can be
continued.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from memory_adapters import MemitConfig, MemoryAdapterConfig, MemorySlotsConfig
from memory_adapters.config import MemoryConfig
from memory_adapters.embedded_model import embedded_model
from memory_adapters.evaluation.comparison.compare import compare
from memory_adapters.evaluation.records import load_counterfact
from memory_adapters.evaluation.scores.perplexity import load_wikitext

METHODS: dict[str, MemoryConfig] = {
    "residual": MemoryAdapterConfig(),
    "memit": MemitConfig(covariance_tokens=8192),
    "slots": MemorySlotsConfig(num_slots=16, span_length=64, refine_steps=40, precision="bfloat16"),
}
NF4: dict[str, Any] = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("MEMORY_ADAPTERS_DATA"), help="folder with the data sets")
    parser.add_argument("--model", help="Hub id or path; by default the embedded model")
    parser.add_argument("--records", type=int, default=20)
    parser.add_argument("--perplexity-tokens", type=int, default=4096)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--output", type=Path, default=Path("docs/results/quantised.json"))
    arguments = parser.parse_args()
    if not arguments.data:
        parser.error("give --data or set MEMORY_ADAPTERS_DATA")
    name = arguments.model or embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(name)
    records = load_counterfact(Path(arguments.data) / "counterfact" / "edit.json", arguments.records)
    text = load_wikitext(Path(arguments.data) / "wikitext2" / "test.txt")
    found: dict[str, Any] = json.loads(arguments.output.read_text())["models"] if arguments.output.exists() else {}
    for label, settings in {
        "4 bits (bitsandbytes NF4)": {"quantization_config": BitsAndBytesConfig(**NF4)},
        "float32": {},
    }.items():
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **settings)
        for method in [method for method in arguments.methods if method not in found.get(label, {})]:
            result = compare(
                model,
                tokenizer,
                records,
                {method: METHODS[method]},
                text=text,
                max_text_tokens=arguments.perplexity_tokens,
                greedy=False,
                costs=False,
            )
            found.setdefault(label, {})[method] = result.to_dict()
            print(f"{label}\n{result!r}", flush=True)
            versions = {"torch": torch.__version__, "bitsandbytes": bitsandbytes.__version__}
            about = {"records": len(records), "perplexity_tokens": arguments.perplexity_tokens, **versions}
            arguments.output.write_text(json.dumps({"about": about, "models": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
