"""Measure what an active memory costs: time of prefill and decoding with it ÷ without it, in the same process.

    python benchmarks/overhead.py [--model HUB_ID_OR_PATH] [--rounds 9]

Rounds alternate between the two; ratios are of the medians, of wall time and of CPU time.
"""

from __future__ import annotations

import torch

from benchmarks.common import DEVICE, BenchmarkParser, in_turn, load_model, save
from memory_adapters import MemoryAdapterConfig, inject_memory

KEYS = 256
DESIGNS = {
    f"default (1 block, {KEYS} keys)": MemoryAdapterConfig(),
    f"3 blocks, {KEYS} keys each": MemoryAdapterConfig(layers=(0.7, 0.8)),
    "the experiment's (3 blocks)": MemoryAdapterConfig.fever_experiment(),
}


def main() -> None:
    parser = BenchmarkParser(__doc__, "overhead")
    parser.add_argument("--rounds", type=int, default=9, quick=1)
    parser.add_argument("--prefill", type=int, default=512, quick=32, help="tokens")
    parser.add_argument("--decode", type=int, default=48, quick=4, help="tokens")
    arguments = parser.parse()
    model, tokenizer = load_model(arguments)
    generator = torch.Generator().manual_seed(arguments.seed)
    ids = torch.randint(100, 1000, (1, arguments.prefill), generator=generator).to(DEVICE)
    prompt = ids[:, :16]
    tokens = arguments.decode
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}

    @torch.no_grad()
    def prefill() -> None:
        model(input_ids=ids, logits_to_keep=1, use_cache=False)

    def decode() -> None:
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **length)

    found: dict[str, dict[str, float]] = {}
    for design, config in DESIGNS.items():
        config.seed = arguments.seed
        memory = inject_memory(model, config, tokenizer=tokenizer)
        for layer in memory.tuner_layers():
            mlp = layer.memory_adapter_mlp[memory.adapter_name]
            if config.token_gate == "keys":
                keys = torch.randn(KEYS, mlp.up.shape[1], generator=generator)
                mlp.add_keys(keys.to(mlp.up), torch.zeros(KEYS).to(mlp.up))
        found[design] = {}
        for label, action in ((f"prefill {ids.shape[1]} tokens", prefill), (f"decode {tokens} tokens", decode)):
            times = in_turn(
                {"without": action, "with": action},
                arguments.rounds,
                before=lambda name, memory=memory: setattr(memory, "active", name == "with"),
            )
            ratio = times["with"] / times["without"]
            found[design] |= {f"{label}, wall": ratio.wall, f"{label}, cpu": ratio.cpu}
            print(f"{design:32} {label:20} wall ×{ratio.wall:.3f}  cpu ×{ratio.cpu:.3f}", flush=True)
        memory.remove()
    save(arguments, {"ratios": found})


if __name__ == "__main__":
    main()
