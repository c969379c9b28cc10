"""The real client of a Hub, in a fresh Python: it reads its settings when it is imported.

`run_client` starts this file with the name of a module-level function of a test module; its arguments are strings, its
result is sent back as JSON.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from memory_adapters import Memory, MemoryAdapterConfig, inject_memory, load_memory, memories
from tests.support.hub import HubServer

THEIR_WARNINGS = [  # huggingface_hub's own upload of large files; PEFT's own look at the model
    *("-W", "ignore:Use 'content=:DeprecationWarning"),
    *("-W", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def start_client(
    server: HubServer, home: Path, function: Callable[..., Any], *args: str, **env: str
) -> subprocess.Popen[str]:
    """Start a function in a fresh Python that is logged in to `server` and caches in `home`."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", *THEIR_WARNINGS, "-m", __name__, function.__module__, function.__name__, *args],
        cwd=Path(__file__).parents[2],
        env={**server.client_environment(home), "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_client(server: HubServer, home: Path, function: Callable[..., Any], *args: str, **env: str) -> Any:
    """What `start_client`'s function returns."""
    process = start_client(server, home, function, *args, **env)
    try:
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


def base_model() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def with_memory(seed: int = 0) -> Memory:
    """A memory whose seeded weights take part in every token."""
    return inject_memory(base_model(), MemoryAdapterConfig(token_gate="none", gate_init=0.5, seed=seed))


@torch.no_grad()
def logits_hash(model: torch.nn.Module) -> str:
    return hashlib.sha256(model(torch.arange(0, 300, 11)[None]).logits.numpy().tobytes()).hexdigest()


def loaded_hash(repo_id: str, revision: str | None = None, token: str | None = None) -> str:
    """Logits of a fresh model with a memory from the Hub."""
    return logits_hash(load_memory(base_model(), repo_id, revision=revision, token=token).model)


def traces(model: PreTrainedModel) -> list[Any]:
    """What a load that fails must leave as it was."""
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [logits_hash(model), list(model.state_dict()), trainable, sorted(vars(model)), hooks, len(memories(model))]


def failed_load(repo_id: str, revision: str | None = None) -> dict[str, Any]:
    """The error of a load that must fail, and whether it left the model as it was."""
    model = base_model()
    before = traces(model)
    try:
        load_memory(model, repo_id, revision=revision)
    except OSError as error:
        return {"error": type(error).__name__, "message": str(error), "unchanged": traces(model) == before}
    raise AssertionError(f"{repo_id} was loaded")


def only_loopback(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook that refuses every other network."""
    if event in ("socket.connect", "socket.getaddrinfo"):
        host = arguments[0] if event == "socket.getaddrinfo" else arguments[1][0]
        if host != "127.0.0.1":
            raise RuntimeError(f"A client of the loopback Hub wanted to reach {host!r}.")


if __name__ == "__main__":
    sys.addaudithook(only_loopback)
    module, function, *arguments = sys.argv[1:]
    print(json.dumps(getattr(importlib.import_module(module), function)(*arguments)))
