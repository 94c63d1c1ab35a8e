# Everything starts from these commands; `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
DEMO ?= demo
TEST_PROCESSES ?= 2
SEED := $(shell date +%s)

.PHONY: help setup demo test faults hard hard-soak hard-strikes quality bench bench-check bench-gpu lint types docs site clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

setup: $(STAMP) ## make .venv and install slidevlm with everything for development

# torch first, under the constraints: where pip is offered a CPU build of just that version it takes
# it, and nothing after pulls in another (CONTRIBUTING.md tells how to offer it one).
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP) ## synthesize a cohort, train, evaluate; a run folder to look at, in minutes
	rm -rf $(DEMO)/cohort $(DEMO)/runs/demo
	$(BIN)/slidevlm demo $(DEMO)

test: $(STAMP) ## the tests, in two processes; ALL=1: those over ten seconds too, as CI does
	$(BIN)/python -m pytest -q --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(if $(ALL),,-m "not slow")

faults: $(STAMP) ## strike a training on two processes down 50 times (make test ALL=1: 8), some 15 minutes
	SLIDEVLM_FAULTS=50 $(BIN)/python -m pytest -q -s tests/faults

hard: $(STAMP) ## two hours of trainings, and beside them faults, damaged and harmful files, fuzzing
	$(MAKE) --jobs 2 hard-soak hard-strikes

hard-soak: $(STAMP)
	SLIDEVLM_SOAK_SECONDS=7200 $(BIN)/python -m pytest -q -s tests/hard/test_soak.py

hard-strikes: $(STAMP)
	$(BIN)/python -m pytest -q -s tests/hard/test_malicious.py
	SLIDEVLM_FUZZ_SECONDS=600 SLIDEVLM_FUZZ_SEED=$(SEED) $(BIN)/python -m pytest -q -s tests/hard/test_fuzz.py
	SLIDEVLM_CORRUPTIONS=5000 SLIDEVLM_FUZZ_SEED=$(SEED) $(BIN)/python -m pytest -q tests/data/formats/test_damage.py
	$(MAKE) faults

quality: $(STAMP) ## train and evaluate on ../shared/data/tcga and the demo cohort, 3 seeds, beside baselines
	$(BIN)/python -m benchmarks.quality --out build/quality

bench: $(STAMP) ## every benchmark, into docs/performance.md and benchmarks/recorded.json; wants a quiet machine
	$(BIN)/python benchmarks/all.py

bench-check: $(STAMP) ## the same again: are the ratios still those that were recorded?
	$(BIN)/python benchmarks/all.py --check

bench-gpu: $(STAMP) ## one GPU: training steps, memory, generation, evaluation
	$(BIN)/python -m benchmarks.gpu

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check src tests benchmarks scripts examples
	$(BIN)/ruff format --check src tests benchmarks scripts examples

types: $(STAMP) ## mypy
	$(BIN)/mypy

docs: $(STAMP) ## write docs/arguments.md anew
	$(BIN)/python -m slidevlm.flags > docs/arguments.md

site: $(STAMP) ## the documentation as a site in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir build/site

clean: ## remove what the commands above made; never your runs in logs/
	rm -rf $(VENV) demo build src/*.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache
