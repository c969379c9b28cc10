"""What reusing the states below the memory saves: an epoch of training with it, as a ratio to the whole model.

    python benchmarks/reuse.py [--model HUB_ID_OR_PATH] [--rounds 5] [--facts 8] [--output docs/results/reuse.json]

The same rows, batches and start; the baseline runs every block and computes logits at every token. Rounds alternate.
The one pass that stores the states is counted apart, as a share of one epoch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from memory_adapters import Fact, MemoryAdapterConfig, ResidualMemory, inject_memory
from memory_adapters.base_model.sampling import OTHER_SUBJECTS, PLAIN_SENTENCES
from memory_adapters.embedded_model import embedded_model
from memory_adapters.residual_mlp.stored_states import ReusedStates
from memory_adapters.residual_mlp.trainer import MemoryTrainer, parameters_of, training_arguments
from memory_adapters.residual_mlp.write import Writer
from memory_adapters.training.dataset import collate
from memory_adapters.training.trainer import only_trainable

DESIGNS = {
    "default": MemoryAdapterConfig(gate_init=0.5),
    "70-80% of the depth": MemoryAdapterConfig(gate_init=0.5, layers=(0.7, 0.8)),
    "the experiment's": MemoryAdapterConfig.fever_experiment(num_prefixes=5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hub id or path; by default the embedded model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--facts", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("docs/results/reuse.json"))
    arguments = parser.parse_args()
    name = arguments.model or embedded_model()
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)
    facts = [Fact("The mother tongue of {} is", name, "English") for name in OTHER_SUBJECTS[: arguments.facts]]
    found = {}
    for what, config in DESIGNS.items():
        memory = inject_memory(model, config, tokenizer=tokenizer)
        assert isinstance(memory, ResidualMemory)
        found[what] = compare(what, memory, facts, arguments.rounds)
        memory.remove()
    about = {
        "command": f"python benchmarks/reuse.py --rounds {arguments.rounds} --facts {arguments.facts}",
        "threads": torch.get_num_threads(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"about": about, "designs": found}, indent=1) + "\n")


def compare(what: str, memory: ResidualMemory, facts: list[Fact], rounds: int) -> dict[str, float]:
    writer = Writer(memory, facts, PLAIN_SENTENCES)
    if memory.config.token_gate == "keys":
        writer.fit_keys()
    rows = [turn.rows[0] for turn in writer.turns]
    reuse = ReusedStates(writer.decoder, writer.layers[0])
    start = time.perf_counter()
    states = reuse.compute(memory.model, [row.input_ids for row in rows])
    stored = time.perf_counter() - start
    examples = [{"row": r, "state": s, "teacher": None, "kept": False} for r, s in zip(rows, states, strict=True)]
    batches = [collate(examples[i : i + 4]) for i in range(0, len(examples), 4)]
    start_weights = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    parameters = [p for n, p in memory.model.named_parameters() if "residual_memory" in n]
    times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    losses: dict[bool, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, only_trainable(memory.model, parameters_of(memory).values()):
        trainer = MemoryTrainer(memory, writer.decoder, reuse, args=training_arguments(memory, folder, None, len(rows)))
        for turn in range(rounds + 1):
            for reused in (True, False):
                for name, tensor in memory.state_dict().items():
                    tensor.copy_(start_weights[name])
                optimizer = torch.optim.AdamW(parameters, lr=1e-3)
                wall, cpu = time.perf_counter(), time.process_time()
                losses[reused] = [step(trainer, memory, optimizer, batch, reused) for batch in batches]
                if turn:  # the first is a warm-up
                    times[reused].append((time.perf_counter() - wall, time.process_time() - cpu))
    wall, cpu = (
        statistics.median(t[i] for t in times[True]) / statistics.median(t[i] for t in times[False]) for i in (0, 1)
    )
    difference = max(abs(a - b) for a, b in zip(losses[True], losses[False], strict=True))
    share = stored / statistics.median(t[0] for t in times[False])
    print(
        f"{what:20} blocks {writer.layers}: epoch wall ×{wall:.3f}  cpu ×{cpu:.3f}  "
        f"largest loss difference {difference:.1e}  storing states once: {share:.2f} of a whole-model epoch",
        flush=True,
    )
    return {"epoch, wall": wall, "epoch, cpu": cpu, "loss difference": difference, "storing the states": share}


def step(
    trainer: MemoryTrainer, memory: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Any], reused: bool
) -> float:
    if reused:
        loss = trainer.compute_loss(memory.model, batch)
    else:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = memory.model(**inputs, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


if __name__ == "__main__":
    main()
