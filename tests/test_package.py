"""The wheel: it holds what a user imports and nothing else, and is imported without the extras and the network."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXTRAS = ("matplotlib", "datasets", "sklearn", "gguf", "gradio", "fastapi", "nbclient", "trl", "pytest")
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


@pytest.mark.integration
def test_the_wheel_holds_the_package_and_is_imported_without_extras(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    about, package = ({name for name in names if (".dist-info/" in name) == is_about} for is_about in (True, False))
    sources = {file.relative_to(ROOT).as_posix() for file in (ROOT / "memory_adapters").rglob("*.py")}
    data = {"py.typed", "evaluation/things.json", "evaluation/comparison/page.html"}
    assert package == sources | {f"memory_adapters/{name}" for name in data}
    assert any(name.endswith("LICENSE") for name in about)
    folders = {part for name in package for part in name.split("/")[:-1]}
    assert not folders & {"tests", "testing", "fever", "benchmarks", "examples"}
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
