# Everything runs in .venv; `make demo` and `make test` set it up themselves.
PYTHON ?= python3
ifeq ($(OS),Windows_NT)
BIN := Scripts
else
BIN := bin
endif
PY := .venv/$(BIN)/python
FLOORS := .venv-floors/$(BIN)/python
PEERS := .venv-peers/$(BIN)/python

# More flags for the paper's tables, the last one of a kind counts: make ablation ARGS="--preset cpu --seeds 1 2 3"
ARGS ?=
ABLATION_DIR ?= work_dirs/ablation
ABLATION = $(PY) main.py --preset paper-mvtec --resume $(ARGS) --work-dir $(ABLATION_DIR)
ABLATION_RUNS = $(foreach name,plain cpc cpc-naive cpc-residual cpc-residual-pos cpc-residual-pos-mixed,$(ABLATION_DIR)/$(name)-seed[0-9]*)

.PHONY: help setup demo paper-mvtec paper-visa paper-cifar10 ablation benchmark-metrics test test-floors torture lint types check \
	audit soak benchmark-gpu benchmark-peers clean

help:
	@echo "make demo    train and evaluate on the built-in sample (about 3 minutes on 2 cores once installed)"
	@echo "make paper-mvtec, make paper-visa, make paper-cifar10, make ablation    train, evaluate and write a table of the paper;"
	@echo "             flags in ARGS, for example ARGS='--seeds 1 2 3'"
	@echo "make test    run the test suite"
	@echo "make test-floors    the suite with the oldest releases that pyproject.toml allows, in .venv-floors (some GB)"
	@echo "make torture kill trainings, mistype commands, damage files, and count what does not come through (10 minutes)"
	@echo "make setup   virtual environment and dependencies only"
	@echo "make audit   known weaknesses of what is installed (needs the network), and a table of its licences"
	@echo "make soak    thousands of steps and predictions, watched for what grows (about 10 minutes)"
	@echo "make benchmark-gpu    speed, memory and right results on this machine's GPU, written to BENCHMARKS.md (8 minutes)"
	@echo "make benchmark-peers ARGS='--data-path DATA'    our models beside anomalib's on your images, in .venv-peers (some GB)"
	@echo "make lint    ruff;  make types: mypy;  make check: lint, types and tests"

setup: .venv/ready

.venv/ready: pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || (echo "Python 3.10 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1)
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -e ".[dev]"
	@echo ready > .venv/ready

demo: setup
	$(PY) main.py --preset sample

paper-mvtec: setup
	$(PY) main.py --preset paper-mvtec $(ARGS)

paper-visa: setup
	$(PY) main.py --preset paper-visa $(ARGS)

# A model for each of UniAD's four groups of normal classes; the score is the mean of the map at 224 px, as UniAD's.
paper-cifar10: setup
	$(PY) main.py --preset paper-mvtec --dataset cifar10 --no-multi-class --input-size 224 --top-k 1 $(ARGS)

# What was finished is not trained again; other settings need another ABLATION_DIR.
ablation: setup
	$(ABLATION) --name plain --no-quantize-enable --no-concat-pos --no-mixed-gaussian
	$(ABLATION) --name cpc --no-pattern-quantize --no-concat-pos --no-mixed-gaussian
	$(ABLATION) --name cpc-naive --quantize-type naive --no-concat-pos --no-mixed-gaussian
	$(ABLATION) --name cpc-residual --no-concat-pos --no-mixed-gaussian
	$(ABLATION) --name cpc-residual-pos --no-mixed-gaussian
	$(ABLATION) --name cpc-residual-pos-mixed
	$(PY) main.py --mode table $(ABLATION_RUNS) --work-dir $(ABLATION_DIR)

benchmark-metrics: setup
	$(PY) benchmarks/metrics.py

benchmark-gpu: setup
	$(PY) benchmarks/gpu.py $(ARGS)

benchmark-peers: setup .venv-peers/ready
	$(PY) benchmarks/peers.py --python $(PEERS) $(ARGS)

.venv-peers/ready: benchmarks/requirements-peers.txt
	$(PYTHON) -m venv .venv-peers
	$(PEERS) -m pip install --quiet -r benchmarks/requirements-peers.txt
	@echo ready > .venv-peers/ready

test: setup
	$(PY) -m pytest -n auto --dist loadfile

# Needs a Python that the oldest releases were built for, 3.10 to 3.12: make test-floors PYTHON=python3.10
test-floors: .venv-floors/ready
	$(FLOORS) -m pytest

.venv-floors/ready: pyproject.toml .ci/floors.py
	$(PYTHON) -m venv .venv-floors
	$(FLOORS) -m pip install --quiet --no-deps -e .
	$(FLOORS) .ci/floors.py > .venv-floors/floors.txt
	$(FLOORS) -m pip install --quiet -r .venv-floors/floors.txt
	@echo ready > .venv-floors/ready

torture: setup
	$(PY) tests/torture.py $(ARGS)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: setup
	$(PY) -m mypy

check: lint types test

audit: setup
	$(PY) .ci/licences.py
	$(PY) -m pip install --quiet -e ".[audit]"
	$(PY) .ci/audit.py

soak: setup
	$(PY) benchmarks/soak.py

clean:
	rm -rf .venv .venv-floors .venv-peers build *.egg-info .pytest_cache .mypy_cache .ruff_cache
