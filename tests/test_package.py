"""The wheel: it builds, holds what it must, and imports without the extras and without the network."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXTRAS = ("matplotlib", "datasets", "sklearn", "gguf", "nbclient", "trl", "pytest")
IMPORT = f"""
import socket, sys
def refuse(*args): raise AssertionError("import reached for the network")
socket.socket.connect = refuse
for name in {EXTRAS}:
    sys.modules[name] = None
import memory_adapters
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
assert "MEMORY_ADAPTER" in PEFT_TYPE_TO_CONFIG_MAPPING
print(memory_adapters.__file__)
"""


@pytest.mark.slow
def test_wheel(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "memory_adapters/py.typed" in names
    assert "memory_adapters/residual_mlp/tuner.py" in names
    assert any(name.endswith("LICENSE") for name in names)
    assert not any(name.startswith(("tests", "examples", "benchmarks")) for name in names)
    site = tmp_path / "site"
    install = [*pip, "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, timeout=300)
    shown = subprocess.run(
        [sys.executable, "-c", IMPORT],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    assert shown.stdout.strip().startswith(str(site))


def test_files_are_short_and_speak_of_the_project_alone() -> None:
    for path in [*ROOT.glob("memory_adapters/**/*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")]:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 300, f"{path} has over 300 lines"
