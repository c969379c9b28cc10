"""Measure what reusing the states below the memory saves: time of a training epoch with it ÷ through the whole model.

    python benchmarks/reuse.py [--model HUB_ID_OR_PATH] [--rounds 5] [--facts 8]

The same rows, batches and first weights; the baseline runs every block and computes logits at every token. Rounds
alternate. The one pass that stores the states is counted apart, as a share of one epoch.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.common import BenchmarkParser, in_turn, load_model, save, timed
from memory_adapters import Fact, MemoryAdapterConfig, ResidualMemory, inject_memory
from memory_adapters.base_model.sampling import OTHER_SUBJECTS, PLAIN_SENTENCES
from memory_adapters.residual_mlp.trainer import MemoryTrainer, parameters_of, training_arguments
from memory_adapters.residual_mlp.write import Writer
from memory_adapters.training.dataset import collate
from memory_adapters.training.stored_states import ReusedStates
from memory_adapters.training.trainer import only_trainable

DESIGNS = {
    "default": MemoryAdapterConfig(gate_init=0.5),
    "70-80% of the depth": MemoryAdapterConfig(gate_init=0.5, layers=(0.7, 0.8)),
    "the experiment's": MemoryAdapterConfig.fever_experiment(num_prefixes=5),
}


def main() -> None:
    parser = BenchmarkParser(__doc__, "reuse")
    parser.add_argument("--rounds", type=int, default=5, quick=1)
    parser.add_argument("--facts", type=int, default=8, quick=2)
    arguments = parser.parse()
    model, tokenizer = load_model(arguments)
    facts = [Fact("The mother tongue of {} is", subject, "English") for subject in OTHER_SUBJECTS[: arguments.facts]]
    found = {}
    for design, config in DESIGNS.items():
        config.seed = arguments.seed
        memory: Any = inject_memory(model, config, tokenizer=tokenizer)
        print(f"{design:20}", end=" ", flush=True)
        found[design] = measure(memory, facts, arguments.rounds)
        memory.remove()
    save(arguments, {"designs": found})


def measure(memory: ResidualMemory, facts: list[Fact], rounds: int) -> dict[str, float]:
    """Train one epoch in both ways in turn, and compare times and losses."""
    writer = Writer(memory, facts, PLAIN_SENTENCES)
    if memory.config.token_gate == "keys":
        writer.fit_keys()
    rows = [turn.rows[0] for turn in writer.turns]
    reuse = ReusedStates(writer.decoder, writer.layers[0])
    storing, states = timed(reuse.compute, memory.model, [row.input_ids for row in rows])
    examples = [{"row": r, "state": s, "teacher": None, "kept": False} for r, s in zip(rows, states, strict=True)]
    batches = [collate(examples[i : i + 4]) for i in range(0, len(examples), 4)]
    first_weights = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    parameters = [p for n, p in memory.model.named_parameters() if "residual_memory" in n]
    losses: dict[bool, list[float]] = {}
    optimizer: Any = None

    def start_again(_name: str) -> None:
        nonlocal optimizer
        for name, tensor in memory.state_dict().items():
            tensor.copy_(first_weights[name])
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def epoch(reused: bool) -> None:
        losses[reused] = []
        for batch in batches:
            loss = trainer.compute_loss(memory.model, batch) if reused else whole_model_loss(memory.model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[reused].append(float(loss.detach()))

    with tempfile.TemporaryDirectory() as folder, only_trainable(memory.model, parameters_of(memory).values()):
        trainer = MemoryTrainer(memory, writer.decoder, reuse, args=training_arguments(memory, folder, None, len(rows)))
        times = in_turn(
            {"whole model": lambda: epoch(False), "reused": lambda: epoch(True)}, rounds, before=start_again
        )
    ratio = times["reused"] / times["whole model"]
    difference = max(abs(a - b) for a, b in zip(losses[True], losses[False], strict=True))
    share = (storing / times["whole model"]).wall
    print(
        f"blocks {writer.layers}: epoch wall ×{ratio.wall:.3f}  cpu ×{ratio.cpu:.3f}  "
        f"largest loss difference {difference:.1e}  storing states once: {share:.2f} of a whole-model epoch",
        flush=True,
    )
    return {
        "epoch, wall": ratio.wall,
        "epoch, cpu": ratio.cpu,
        "loss difference": difference,
        "storing the states": share,
    }


def whole_model_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Compute the same loss by every block, with logits at every token."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


if __name__ == "__main__":
    main()
