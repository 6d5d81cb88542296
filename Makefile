# Every target first creates the virtual environment .venv if it is missing. Nothing global is installed.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint docs parity accumulation portability chaos chaos-data fuzz checkpoint-cost gpu-check bench-data bench-loader bench-evaluation bench-train bench-generation speedrun plan-check control-plane start-memory rehearse scaling wheel clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 17

quickstart: .venv/run ## train, evaluate and sample a small GPT-2 on a fresh machine
	$(BIN)/python launch/quickstart.py

test: .venv/dev ## run the whole test suite, on the CPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 5 --dist loadfile --no-loadscope-reorder

lint: .venv/dev ## check the code, the docs with their links, and the files for GitHub and Docker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_docs.py::test_prose_fits_120_columns
	$(BIN)/mkdocs build --quiet --strict
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[bi]*.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.citation-file-format CITATION.cff

docs: .venv/dev ## build the documentation as a site in site/
	$(BIN)/mkdocs build --strict

parity: .venv/dev ## compare loss and gradient norm of all backends x processes
	$(BIN)/python -m benchmarks.parity

accumulation: .venv/dev ## compare micro-batches x processes, with and without masked targets
	$(BIN)/python -m benchmarks.accumulation

portability: .venv/dev ## continue the checkpoints of every backend under every other, at other world sizes
	$(BIN)/python -m benchmarks.portability

chaos: .venv/dev ## kill runs at random moments and continue them under random backends
	$(BIN)/python -m benchmarks.chaos

chaos-data: .venv/dev ## kill stage 1 at random moments, repeat it, and compare the bytes
	$(BIN)/python -m benchmarks.chaos_data

fuzz: .venv/dev ## damage inputs of every kind, and check that commands end with one error line
	$(BIN)/python -m benchmarks.fuzz

checkpoint-cost: .venv/dev ## measure pause, throughput and memory of saving and loading GPT-2 124M
	$(BIN)/python -m benchmarks.checkpoint_cost

bench-data: .venv/dev ## compare stage 1 with other tools: speed, identical ids, memory
	$(BIN)/python -m benchmarks.data

bench-loader: .venv/dev ## compare the data loader with one that reads whole shards
	$(BIN)/python -m benchmarks.loader

CHECK ?=
gpu-check: .venv/dev ## run the most important GPU checks in nine minutes, repeat it for the rest: CHECK="--minutes 20"
	$(BIN)/python -m benchmarks.gpu_check $(CHECK)

DATA ?=
bench-evaluation: .venv/harness ## compare with lm-evaluation-harness and build-nanogpt: DATA="--piqa FILE --lambada FILE"
	$(BIN)/python -m benchmarks.evaluation $(DATA)

bench-train: .venv/dev ## compare the training speed with transformers
	$(BIN)/python -m benchmarks.train

bench-generation: .venv/dev ## compare the generation speed on the CPU with transformers
	$(BIN)/python -m benchmarks.generation

speedrun: .venv/dev ## measure the time that AdamW and Muon need to reach a loss, in 18 runs
	$(BIN)/python -m benchmarks.speedrun

plan-check: .venv/dev ## compare planned memory with measured peaks and with up to 4,096 ranks
	$(BIN)/python -m benchmarks.planned_memory

control-plane: .venv/dev ## measure the store, the heartbeats and a checkpoint of 4,096 simulated ranks
	$(BIN)/python -m benchmarks.control_plane

start-memory: .venv/dev ## measure the peak memory of each rank at the start of a run, with up to GPT-2 1558M
	$(BIN)/python -m benchmarks.start_memory

rehearse: .venv/dev ## rehearse runs on 2 and 4 hosts, and the loss of hosts and links, on this Linux machine
	$(BIN)/python -m benchmarks.rehearsal

scaling: .venv/dev ## compare predicted with measured step times: 1, 2 and 4 processes, and slow links between hosts
	$(BIN)/python -m benchmarks.scaling

wheel: .venv/dev ## build the wheel in dist/ and check it
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation
	$(BIN)/python -m twine check --strict dist/*.whl

clean: ## remove the environment and caches; keep data and runs
	rm -rf .venv build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is older than Python 3.10; give another one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv

# pip shows no progress with --quiet.
define announce_installation
@if [ -n "$$PIP_EXTRA_INDEX_URL" ]; then echo "installing the packages in .venv"; else \
	echo "installing the packages in .venv; on Linux, pip downloads several gigabytes for NVIDIA GPUs."; \
	echo "Without a GPU, stop with Ctrl-C, and first run:" \
		"export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"; fi
endef

.venv/run: setup.py constraints.txt | .venv/bin/python
	$(announce_installation)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[plots]'
	@touch $@

.venv/harness: setup.py constraints.txt | .venv/dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[harness]'
	@touch $@

.venv/dev: setup.py constraints.txt | .venv/bin/python
	$(announce_installation)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs,lint,test]'
	@touch $@ .venv/run
