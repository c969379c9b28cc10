"""Memories on a model that two processes share with FSDP2.

ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 tests/support/launched_sharded.py OUTPUT
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from memory_adapters import inject_memory
from memory_adapters.training.distributed import is_main_process, world_size
from tests.support.composing import SUITES
from tests.support.contract import PROMPT, encode, logits
from tests.support.models import byte_tokenizer, tiny_model


def sharded(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def refusal(action: Any) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    PartialState()  # as in a user's script: on CPUs it counts one process
    assert world_size() == 2
    result: dict[str, Any] = {}
    for kind, suite in SUITES.items():
        model: Any = tiny_model()
        memory = inject_memory(model, suite.make_config(), tokenizer=byte_tokenizer())
        suite.fill(memory)
        expected = logits(model)
        gradients = {}
        if kind == "residual":
            model(**encode(PROMPT), use_cache=False).logits.square().mean().backward()
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            model.zero_grad()
        sharded(model)
        apart = (logits(model) - expected).abs().max()
        off = 0.0
        if kind == "residual":
            model(**encode(PROMPT), use_cache=False).logits.square().mean().backward()
            grown = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            assert grown.keys() == gradients.keys()
            assert all(isinstance(gradient, DTensor) for gradient in grown.values())
            off = max(float((grown[n].full_tensor() - g).abs().max()) for n, g in gradients.items())  # type: ignore
            assert max(float(g.abs().max()) for g in gradients.values()) > 1e-3
        result[kind] = {
            "logits": float(apart),
            "gradients": off,
            "write": refusal(lambda m=memory, s=suite: s.write(m)),
        }
    for kind, suite in SUITES.items():
        late = sharded(tiny_model())
        names = list(late.state_dict())
        result[kind]["late"] = refusal(lambda m=late, s=suite: inject_memory(m, s.make_config()))
        result[kind]["unchanged"] = list(late.state_dict()) == names
    if is_main_process():
        torch.save(result, sys.argv[1])


if __name__ == "__main__":
    main()
