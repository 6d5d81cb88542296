# Every target sets itself up: a virtual environment in .venv, nothing global. The second call is fast.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint parity accumulation portability chaos chaos-data checkpoint-cost bench-data bench-loader bench-evaluation bench-train bench-generation plan-check clean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 17

quickstart: .venv/run ## fresh machine to a trained, evaluated, sampled small GPT-2
	$(BIN)/python launch/run.py --config ds_configs/ddp.json ds_configs/quickstart.json

test: .venv/dev ## the whole test suite, on the CPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: .venv/dev ## ruff, types, and the line length of Markdown
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_docs.py::test_prose_fits_120_columns

parity: .venv/dev ## the table backends x processes: largest differences in loss and gradient norm
	$(BIN)/python -m benchmarks.parity

accumulation: .venv/dev ## the table micro-batches x processes, with and without masked targets
	$(BIN)/python -m benchmarks.accumulation

portability: .venv/dev ## every backend continues what every other saved, at other world sizes
	$(BIN)/python -m benchmarks.portability

chaos: .venv/dev ## runs killed at random moments, continued under random backends
	$(BIN)/python -m benchmarks.chaos

chaos-data: .venv/dev ## stage 1 killed at random moments and repeated: same bytes
	$(BIN)/python -m benchmarks.chaos_data

checkpoint-cost: .venv/dev ## pause, throughput and memory of saving and loading GPT-2 124M
	$(BIN)/python -m benchmarks.checkpoint_cost

bench-data: .venv/dev ## stage 1 against what people use today: speed, identical ids, memory
	$(BIN)/python -m benchmarks.data

bench-loader: .venv/dev ## the loader against one that reads whole shards: batches, memory, seeks, waiting
	$(BIN)/python -m benchmarks.loader

DATA ?=
bench-evaluation: .venv/harness ## lm-evaluation-harness' numbers and build-nanogpt's speed: DATA="--piqa FILE --lambada FILE"
	$(BIN)/python -m benchmarks.evaluation $(DATA)

bench-train: .venv/dev ## training against transformers: tokens per second, share of what the machine can do, memory
	$(BIN)/python -m benchmarks.train

bench-generation: .venv/dev ## GPT-2 124M writing on the CPU, against transformers in its best settings
	$(BIN)/python -m benchmarks.generation

plan-check: .venv/dev ## planned memory against measured peaks, and against the wrapping code at up to 4,096 ranks
	$(BIN)/python -m benchmarks.planned_memory

clean: ## remove the environment and caches; data and runs stay
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is older than Python 3.10; give another one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv

.venv/run: setup.py constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[plots]'
	@touch $@

.venv/harness: setup.py constraints.txt | .venv/dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[harness]'
	@touch $@

.venv/dev: setup.py constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	@touch $@ .venv/run
