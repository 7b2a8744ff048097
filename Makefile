# Everything runs in .venv; `make demo` and `make test` set it up themselves.
PYTHON ?= python3
ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif
PY := $(BIN)/python

.PHONY: help setup demo test lint types check clean

help:
	@echo "make demo    train and evaluate on the built-in sample (about 4 minutes on 2 cores)"
	@echo "make test    run the test suite"
	@echo "make setup   virtual environment and dependencies only"
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

test: setup
	$(PY) -m pytest

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: setup
	$(PY) -m mypy

check: lint types test

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
