"""Compare the same facts written by each method into a model in 4 bits and in float32, each beside its own base model.

    python benchmarks/quantised.py --data FOLDER [--records 20] [--methods residual memit slots]

FOLDER holds counterfact/edit.json and wikitext2/test.txt. The 4-bit model is bitsandbytes' NF4 of the same weights.
Results are saved as they come, and an interrupted run goes on from them.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from transformers import BitsAndBytesConfig

from benchmarks.common import BenchmarkParser, counterfact, load_model, save, stored, wikitext
from memory_adapters import MemitConfig, MemoryAdapterConfig, MemorySlotsConfig
from memory_adapters.config import MemoryConfig
from memory_adapters.evaluation.comparison.compare import compare

METHODS: dict[str, MemoryConfig] = {
    "residual": MemoryAdapterConfig(),
    "memit": MemitConfig(covariance_tokens=8192),
    "slots": MemorySlotsConfig(read="all", num_slots=16, span_length=64, refine_steps=40, precision="bfloat16"),
}
NF4: dict[str, Any] = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
MODELS: dict[str, dict[str, Any]] = {
    "4 bits (bitsandbytes NF4)": {"quantization_config": BitsAndBytesConfig(**NF4)},
    "float32": {},
}


def main() -> None:
    parser = BenchmarkParser(__doc__, "quantised", data=True)
    parser.add_records(20, perplexity_tokens=4096)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), quick=["residual"])
    arguments = parser.parse()
    records, text = counterfact(arguments, arguments.records), wikitext(arguments, "test")
    found = stored(arguments, "models")
    for label, settings in MODELS.items():
        model, tokenizer = load_model(arguments, **settings)
        for method in [method for method in arguments.methods if method not in found.get(label, {})]:
            METHODS[method].seed = arguments.seed
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
            save(
                arguments,
                {"models": found},
                records=len(records),
                perplexity_tokens=arguments.perplexity_tokens,
                bitsandbytes=bitsandbytes.__version__,
            )


if __name__ == "__main__":
    main()
