"""Train the encoders of memory slots that come with the project, for SmolLM2-135M-Instruct; it measures no baseline.

    python -m benchmarks.train_encoder --data FOLDER [--space embeddings] [--steps 600] [--output build/slot-encoder]

FOLDER holds wikitext2/valid.txt, fever/pages.jsonl and qa/contexts.jsonl; the last 100 contexts are held out. Into
embeddings: of the examples, 70% ask for the text itself, 15% for its continuation, and 15% are questions about it. Into
keys and values: two thirds are continuations of texts of up to `--longest` tokens, and one third questions, all learned
from the model that reads the whole text. Resumes from the newest checkpoint in the output folder. `benchmarks/slots.py`
and `benchmarks/keys_values.py` score them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset

from benchmarks.common import DEVICE, BenchmarkParser, dumps, load_model, wikitext
from benchmarks.slots import HELD_OUT, contexts
from memory_adapters import MemorySlotsConfig, inject_memory
from memory_adapters.base_model.modes import computes_in_bfloat16
from memory_adapters.memory_slots.encoder_training import Example, TextExamples, instruction_examples, train_encoder
from memory_adapters.memory_slots.loss import Query
from memory_adapters.memory_slots.question_answering import question_prompt
from memory_adapters.training.checkpoints import newest_checkpoint

MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def continued(ids: list[int]) -> Example:
    """Ask for the last third of a text behind the rest."""
    end = len(ids) * 2 // 3
    return Example(ids[:end], Query(ids[end : end + 1], ids[end + 1 :]))


def main() -> None:
    parser = BenchmarkParser(__doc__, None, data=True)
    parser.add_argument("--space", choices=["embeddings", "kv"], default="embeddings")
    parser.add_argument("--slots", type=int, default=32, help="of a full span")
    parser.add_argument("--span", type=int, default=64, help="tokens of a full span")
    parser.add_argument("--longest", type=int, default=640, quick=192, help="tokens of a text; kv alone")
    parser.add_argument("--bidirectional", action="store_true", help="the encoder's tokens attend to all of the text")
    parser.add_argument("--rank", type=int, default=16, help="of the encoder's LoRA")
    parser.add_argument("--steps", type=int, default=600, quick=2)
    parser.add_argument("--evaluate-every", type=int, default=50)
    parser.add_argument("--batch", type=int, default=16, quick=4)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--output", type=Path, default=Path("build/slot-encoder"), quick=Path("build/quick/encoder"))
    arguments = parser.parse()
    # Short rows: on a CPU the plain attention is faster than the fused one.
    dtype = torch.bfloat16 if computes_in_bfloat16("bfloat16", torch.device(DEVICE)) else torch.float32
    model, tokenizer = load_model(arguments, dtype, attn_implementation="eager")
    rows = contexts(arguments.data)
    with open(arguments.data / "fever" / "pages.jsonl", encoding="utf-8") as file:
        texts = [row["context"] for row in rows[:-HELD_OUT]] + [json.loads(line)["text"] for line in file]
    texts.append(wikitext(arguments, "valid"))
    ids = tokenizer("\n".join(texts), add_special_tokens=False)["input_ids"]
    held_out = [tokenizer(row["context"], add_special_tokens=False)["input_ids"] for row in rows[-HELD_OUT:]]

    settings: dict[str, Any] = dict(
        num_slots=arguments.slots,
        span_length=arguments.span,
        lora_rank=arguments.rank,
        bidirectional=arguments.bidirectional,
    )
    in_kv = arguments.space == "kv"
    if in_kv:
        settings |= dict(space="kv", target_modules=MATRICES, objective="distillation")
    else:
        settings |= dict(read="all")
    config = MemorySlotsConfig(**settings, lora_alpha=(2 if in_kv else 1) * arguments.rank, seed=arguments.seed)
    memory: Any = inject_memory(model, config, tokenizer=tokenizer)
    count = arguments.steps * arguments.batch
    prompt = question_prompt(tokenizer)
    queries = [
        {"context": row["context"], "prompt": prompt.replace("{question}", question), "response": answer}
        for row in rows[:-HELD_OUT]
        for question, answer in zip(row["questions"], row["answers"], strict=True)
    ]
    asked = max(1, count // 3 if in_kv else count * 3 // 20)
    questions: Any = instruction_examples(queries[:: max(1, len(queries) // asked)], tokenizer)
    span = arguments.span
    if in_kv:
        texts_asked = [TextExamples(ids, (span // 2, arguments.longest), 48, 0.0, count - asked)]
    else:
        texts_asked = [
            TextExamples(ids, (span // 4, span), 0, 1.0, count * 70 // 100),
            TextExamples(ids, (span, 2 * span), 32, 0.0, count * 15 // 100),
        ]
    examples: ConcatDataset[Example] = ConcatDataset([*texts_asked, questions])
    print(f"{len(ids):,} tokens, {len(examples):,} examples, {len(questions):,} of them questions", flush=True)
    log = train_encoder(
        memory,
        examples,
        held_out=[continued(row) if in_kv else Example(row[: arguments.span]) for row in held_out[:48]],
        training_args=dict(
            output_dir=str(arguments.output),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch,
            per_device_eval_batch_size=arguments.batch,
            learning_rate=arguments.rate,
            warmup_steps=20,
            eval_strategy="steps",
            eval_steps=arguments.evaluate_every,
            logging_steps=min(10, arguments.steps),
            save_strategy="steps",
            save_steps=arguments.evaluate_every,
            save_total_limit=1,
        ),
        resume_from_checkpoint=(not arguments.quick and newest_checkpoint(arguments.output)) or False,
    )
    curve = [{key: row[key] for key in ("step", "loss", "eval_loss") if key in row} for row in log]
    (arguments.output / "training.json").write_text(dumps([row for row in curve if len(row) > 1]) + "\n")
    memory.save_pretrained(arguments.output / "encoder")


if __name__ == "__main__":
    main()
