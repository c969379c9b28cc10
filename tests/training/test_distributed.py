"""Two processes give what one gives: covariance, edits, residual memories, slot encoders."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

from memory_adapters.training.distributed import gather_items, mean_weight, share_of
from tests.support import launched

ROOT = Path(__file__).parents[2]


def launch(script: Path, *arguments: str) -> None:
    """Run a script in two processes with `accelerate launch`, on gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(port), str(script), *arguments]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_single_process_does_everything_and_starts_no_process_group() -> None:
    items = ["a", "b", "c"]
    assert share_of(items) == items
    assert gather_items(share_of(items), 3) == items
    assert gather_items([], 0) == []
    assert mean_weight(3) == 1.0
    assert mean_weight(0) == 0.0
    assert not distributed.is_initialized()


@pytest.mark.integration
def test_importing_the_package_joins_no_processes() -> None:
    script = """
import memory_adapters, memory_adapters.training.trainer
from accelerate import PartialState
from torch import distributed
assert PartialState._shared_state == {}
assert not distributed.is_initialized()
"""
    launched_by_torchrun = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **launched_by_torchrun, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, timeout=120, check=True)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("two")
    launch(ROOT / "tests" / "support" / "launched.py", str(folder / "result.pt"), str(folder))
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.mark.integration
@pytest.mark.parametrize("task", launched.TASKS)
def test_two_processes_give_what_one_gives(
    task: str, together: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    one_process = launched.TASKS[task](tmp_path)
    assert one_process.keys() == together[task].keys()
    for name, tensor in one_process.items():
        torch.testing.assert_close(
            together[task][name], tensor, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.integration
def test_fsdp2_after_injection_is_exact_and_before_it_is_refused(tmp_path: Path) -> None:
    launch(ROOT / "tests" / "support" / "launched_sharded.py", str(tmp_path / "result.pt"))
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    assert set(result) == {"residual", "memit", "slots"}
    for found in result.values():
        assert found["logits"] < 1e-5
        assert found["gradients"] < 1e-6
        assert found["unchanged"]
        for refused in (found["late"], found["write"]):
            assert "`model` is sharded already" in refused
            assert "call `fully_shard`" in refused
