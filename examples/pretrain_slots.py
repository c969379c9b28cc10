"""Train an encoder of memory slots on any text, half by autoencoding and half by text continuation.

    python examples/pretrain_slots.py --text FILE [FILE ...] [--model HUB_ID_OR_PATH] [--steps 1000] [--output FOLDER]
    python examples/pretrain_slots.py --dataset NAME [--subset NAME] [--split train] [--column text] ...

The second form reads a dataset of the Hub, or a local folder of data files, through the package `datasets`. It resumes
from the newest checkpoint in FOLDER. On several GPUs: `accelerate launch examples/pretrain_slots.py ...`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memory_adapters import MemorySlotsConfig, inject_memory
from memory_adapters.embedded_model import embedded_model
from memory_adapters.memory_slots.encoder_training import TextExamples, train_encoder
from memory_adapters.training.checkpoints import newest_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, nargs="+", help="text files")
    source.add_argument("--dataset", help="Hub id, or a folder of data files")
    parser.add_argument("--subset", help="subset of the dataset")
    parser.add_argument("--split", default="train", help="split of the dataset")
    parser.add_argument("--column", default="text", help="column with the text")
    parser.add_argument("--model", help="Hub id or path; by default the embedded model")
    parser.add_argument("--slots", type=int, default=16, help="slots of a full span")
    parser.add_argument("--span", type=int, default=64, help="tokens of a full span")
    parser.add_argument("--rank", type=int, default=32, help="rank of the encoder's LoRA")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the frozen model")
    parser.add_argument("--output", type=Path, default=Path("slot-encoder"))
    arguments = parser.parse_args()
    name = arguments.model or embedded_model()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, arguments.dtype)).to(device)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if arguments.dataset:
        from datasets import load_dataset

        texts = load_dataset(arguments.dataset, arguments.subset, split=arguments.split)[arguments.column]
    else:
        texts = [path.read_text(encoding="utf-8") for path in arguments.text]
    text = "\n\n".join(texts)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    held_out = len(ids) // 20

    settings: dict[str, Any] = dict(num_slots=arguments.slots, span_length=arguments.span, lora_rank=arguments.rank)
    config = MemorySlotsConfig(read="all", **settings)
    memory: Any = inject_memory(model, config, tokenizer=tokenizer)
    shape: dict[str, Any] = dict(lengths=(arguments.span // 2, 4 * arguments.span), continuation=64, share=0.5)
    log = train_encoder(
        memory,
        TextExamples(ids[held_out:], count=arguments.steps * arguments.batch, **shape),
        held_out=TextExamples(ids[:held_out], count=64, **shape),
        training_args=dict(
            output_dir=str(arguments.output),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch,
            per_device_eval_batch_size=arguments.batch,
            learning_rate=arguments.rate,
            warmup_steps=min(300, arguments.steps // 10),
            eval_strategy="steps",
            eval_steps=max(arguments.steps // 20, 1),
            logging_steps=max(arguments.steps // 100, 1),
            save_strategy="steps",
            save_steps=max(arguments.steps // 10, 1),
            save_total_limit=1,
        ),
        resume_from_checkpoint=newest_checkpoint(arguments.output) or False,
    )
    for entry in log:
        if "eval_loss" in entry:
            print(f"step {entry['step']}: held-out loss {entry['eval_loss']:.3f}")
    memory.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
