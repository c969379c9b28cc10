"""Train the encoder of memory slots that comes with the project, for SmolLM2-135M-Instruct.

    python benchmarks/train_encoder.py --data FOLDER [--steps 600] [--output build/slot-encoder]

FOLDER holds wikitext2/valid.txt, fever/pages.jsonl and qa/contexts.jsonl; the last 100 contexts are held out. Of the
examples, 70% ask for the text itself, 15% for its continuation, and 15% are questions about it. Resumes from the newest
checkpoint in the output folder.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from slots import HELD_OUT
from torch.utils.data import ConcatDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from memory_adapters import MemorySlotsConfig, inject_memory
from memory_adapters.embedded_model import embedded_model
from memory_adapters.evaluation.scores.perplexity import load_wikitext
from memory_adapters.memory_slots.encoder_training import Example, TextExamples, instruction_examples, train_encoder
from memory_adapters.memory_slots.question_answering import question_prompt
from memory_adapters.training.checkpoints import newest_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("MEMORY_ADAPTERS_DATA"), help="folder with the data sets")
    parser.add_argument("--model", help="Hub id or path; by default the embedded model")
    parser.add_argument("--slots", type=int, default=32, help="of a full span")
    parser.add_argument("--span", type=int, default=64, help="tokens of a full span")
    parser.add_argument("--rank", type=int, default=16, help="of the encoder's LoRA")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--output", type=Path, default=Path("build/slot-encoder"))
    arguments = parser.parse_args()
    if not arguments.data:
        parser.error("give --data or set MEMORY_ADAPTERS_DATA")
    data, name = Path(arguments.data), arguments.model or embedded_model()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Short rows: on a CPU the plain attention is faster than the fused one.
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(name)
    rows = [json.loads(line) for line in (data / "qa" / "contexts.jsonl").read_text(encoding="utf-8").splitlines()]
    pages = [json.loads(line) for line in (data / "fever" / "pages.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [row["context"] for row in rows[:-HELD_OUT]] + [page["text"] for page in pages]
    texts.append(load_wikitext(data / "wikitext2" / "valid.txt"))
    ids = tokenizer("\n".join(texts), add_special_tokens=False)["input_ids"]
    held_out = [tokenizer(row["context"], add_special_tokens=False)["input_ids"] for row in rows[-HELD_OUT:]]

    config = MemorySlotsConfig(num_slots=arguments.slots, span_length=arguments.span, lora_rank=arguments.rank)
    config.lora_alpha = arguments.rank
    memory: Any = inject_memory(model.to(device), config, tokenizer=tokenizer)
    count = arguments.steps * arguments.batch
    prompt = question_prompt(tokenizer)
    asked = [
        {"context": row["context"], "prompt": prompt.replace("{question}", question), "response": answer}
        for row in rows[:-HELD_OUT]
        for question, answer in zip(row["questions"], row["answers"], strict=True)
    ]
    questions = instruction_examples(asked[:: max(1, len(asked) * 20 // (3 * count))], tokenizer)
    span = arguments.span
    examples = ConcatDataset(
        [
            TextExamples(ids, (span // 4, span), 0, 1.0, count * 70 // 100),
            TextExamples(ids, (span, 2 * span), 32, 0.0, count * 15 // 100),
            questions,  # type: ignore[list-item]
        ]
    )
    print(f"{len(ids):,} tokens, {len(examples):,} examples, {len(questions):,} of them questions", flush=True)
    log = train_encoder(
        memory,
        examples,
        held_out=[Example(row[: arguments.span]) for row in held_out[:48]],
        training_args=dict(
            output_dir=str(arguments.output),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch,
            per_device_eval_batch_size=arguments.batch,
            learning_rate=arguments.rate,
            warmup_steps=20,
            eval_strategy="steps",
            eval_steps=50,
            logging_steps=10,
            save_strategy="steps",
            save_steps=50,
            save_total_limit=1,
        ),
        resume_from_checkpoint=newest_checkpoint(arguments.output) or False,
    )
    curve = [{key: row[key] for key in ("step", "loss", "eval_loss") if key in row} for row in log]
    (arguments.output / "training.json").write_text(json.dumps([row for row in curve if len(row) > 1], indent=1) + "\n")
    memory.save_pretrained(arguments.output / "encoder")


if __name__ == "__main__":
    main()
