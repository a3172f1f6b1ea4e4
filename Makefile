# What a newcomer types. Needs Python 3.10 or later and nothing else; everything else goes into .venv.
PYTHON ?= python3
VENV ?= .venv
# Passed on to pytest by `make test`, for example ARGS="-k placement".
ARGS ?=
# The tests of a file run one after the other, files beside each other; WORKERS=0 for one after the other throughout.
WORKERS ?= 3

SHELL := /bin/bash
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
PANEL := $(shell find labextension -type f -not -path 'labextension/lib/*')
export PATH := $(BIN):$(PATH)

# An environment that was not finished must not pass for one.
.DELETE_ON_ERROR:

# A pool that was started for a job ends by itself a moment after it; nothing is to be left when make returns.
define WAIT_FOR_POOL
import psutil
pools = [p for p in psutil.process_iter(["cmdline"]) if "jupyter_gpupool.api.server" in (p.info["cmdline"] or [])]
psutil.wait_procs([p for p in pools if any("starter_fd" in word for word in p.info["cmdline"])], timeout=10)
endef
export WAIT_FOR_POOL

.PHONY: help demo test soak lab lint bench conformance programs pictures clean

help:
	@echo "make demo         train on two emulated GPUs at 80 % of their memory, through a pool of its own"
	@echo "make lab          JupyterLab with the pool"
	@echo "make test         every test"
	@echo "make soak         the tests that try something many times, many more times; half an hour"
	@echo "make conformance  every sample of PyTorch's operator suite against the CPU, and make programs; half an hour"
	@echo "make programs     transformers, accelerate, lightning, torchmetrics and skorch on leased GPUs"
	@echo "make lint         ruff, mypy, prettier, eslint"
	@echo "make bench        measure, and write what was measured as JSON"
	@echo "make pictures     the README's pictures, made anew"
	@echo "make clean        remove what these commands have made"

demo: $(STAMP)
	gpupool run -n 2 -p 0.8 -- python -m jupyter_gpupool.examples.mnist --epochs 2
	@python -c "$$WAIT_FOR_POOL"

lab: $(STAMP)
	jupyter lab

test: $(STAMP)
	python -m pytest -rs -n $(WORKERS) --dist loadfile --durations=25 $(ARGS)

soak: $(STAMP)
	GPUPOOL_SOAK=1 python -m pytest -rs $(ARGS)

lint: $(STAMP)
	ruff check
	mypy
	jlpm lint

# The libraries of the extra `programs` come with everything they need; PyTorch stays as it is.
conformance: programs
	python -m benchmarks.conformance.sweep $(ARGS)

programs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test,programs]"
	python -m pytest -rs tests/programs $(ARGS)

# Those of the README, of a JupyterLab that runs here.
pictures: $(STAMP)
	python -m pytest -n 0 -rs tests/ui/pictures.py

bench: $(STAMP)
	python -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) node_modules .yarn dist labextension/lib jupyter_gpupool/labextension
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "Python 3.10 or later is needed: say which with PYTHON=..., for example 'make demo PYTHON=python3.12'." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: install its venv package (python3-venv on Debian)." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One resolution with the pinned PyTorch in it, so that nothing brings another one.
$(STAMP): $(BIN)/python pyproject.toml package.json yarn.lock $(PANEL) jupyter_gpupool/jupyter/jupyter_server_config.json
	@echo "Installing into $(VENV); the first time takes a few minutes."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	@touch $@
