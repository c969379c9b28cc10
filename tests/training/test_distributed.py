"""Two processes give what one gives: covariance, edits, residual memories, slot encoders."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("two")
    launch(ROOT / "tests" / "launched.py", str(folder / "result.pt"), str(folder))
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("task", launched.TASKS)
def test_two_processes_give_what_one_gives(
    task: str, together: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    alone = launched.TASKS[task](tmp_path)
    assert alone.keys() == together[task].keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(
            together[task][name], tensor, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.slow
def test_fsdp2_after_injection_is_exact_and_before_it_is_refused(tmp_path: Path) -> None:
    launch(ROOT / "tests" / "launched_sharded.py", str(tmp_path / "result.pt"))
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    assert set(result) == {"residual", "memit", "slots"}
    for found in result.values():
        assert found["logits"] < 1e-5
        assert found["gradients"] < 1e-6
        assert found["unchanged"]
        for refused in (found["late"], found["write"]):
            assert "`model` is sharded already" in refused
            assert "call `fully_shard`" in refused
