# What a newcomer types. Needs Linux and Python 3.10 or later; everything else goes into .venv.
PYTHON ?= python3
VENV ?= .venv
# Passed on to pytest by the test targets, for example ARGS="-k placement".
ARGS ?=
# Where `make kubernetes` keeps the API server that it builds.
KUBERNETES_TOOLS ?= $(HOME)/.cache/gpupool-kubernetes
# The tests of a file run one after the other, files beside each other; WORKERS=0 for one after the other throughout.
WORKERS ?= 3

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
BIN := $(abspath $(VENV))/bin
# What the installed package depends on; a change installs it anew.
INSTALLED := pyproject.toml .make/hatch_build.py .make/install.py .make/lock.py .make/lock.txt jupyter_gpupool/jupyter/jupyter_server_config.json
EXTENSION := jupyter_gpupool/labextension/package.json
PANEL := $(shell find labextension -type f -not -path 'labextension/lib/*')
export PATH := $(BIN):$(PATH)
# Nothing is compiled when it is installed, so the first import has to keep what it compiles.
unexport PYTHONDONTWRITEBYTECODE
# The builder's Node: this machine's where it is new enough, one from a wheel otherwise.
NODE = $(shell node -e 'const [a, b] = process.versions.node.split("."); process.exit(a * 100 + +b < 2019 ? 1 : 0)' 2>/dev/null || echo ,node)

# An environment that was not finished must not pass for one.
.DELETE_ON_ERROR:

# 2.9 is the ratio of the sum of all files to the time of the run in which they were timed, with three workers.
define FORECAST
import json, pathlib
total_s = sum(json.loads(pathlib.Path("tests/durations.json").read_text()).values())
print(f"Every test takes about {total_s / 2.9 / 60:.0f} minutes on two cores; make test-quick takes up to 3.")
endef
export FORECAST

.PHONY: help demo lab test test-quick soak kubernetes lint format bench conformance programs torch-matrix jax-matrix floors lock pictures docs docs-links gpu clean

help:
	@echo "make demo         train on two emulated GPUs at 80 % of their memory, through a pool of its own"
	@echo "make lab          JupyterLab with the pool"
	@echo "make test         every test; about twenty minutes on two cores"
	@echo "make test-quick   the short tests without browser, cluster and hub; up to 3 minutes"
	@echo "make soak         the tests that try something many times, many more times; half an hour"
	@echo "make kubernetes   the tests on a Kubernetes API server, which the first call builds; Debian 12, root, ten minutes"
	@echo "make conformance  every sample of PyTorch's operator suite against the CPU, and make programs; half an hour"
	@echo "make programs     public scripts, transformers, lightning and others on leased GPUs; up to half an hour"
	@echo "make torch-matrix the device's tests on other releases: TORCH='2.14.1 2.15.0'; up to half an hour each, several GB"
	@echo "make jax-matrix   the tests of JAX on other releases: JAX='0.7.2 0.8.3 0.9.2'; 500 MB each"
	@echo "make floors       the tests with the oldest version of each dependency that pyproject.toml admits; half an hour"
	@echo "make lock         resolve what tests and images install, with hashes, anew; needs the network"
	@echo "make lint         ruff, import-linter, mypy, prettier, eslint, tsc"
	@echo "make bench        measure, and write what was measured as JSON"
	@echo "make gpu          everything that only a real GPU shows, in ten minutes; ARGS=--rehearse tries it without one"
	@echo "make pictures     the README's pictures, made anew"
	@echo "make docs         the documentation site, into docs/_build/html; a warning is an error"
	@echo "make docs-links   whether the site's links to other sites work; needs the network"
	@echo "make clean        remove what these commands have made"

demo: $(VENV)/.demo
	gpupool run -n 2 -p 0.8 -- python -m jupyter_gpupool.examples.mnist --epochs 2
	@python .make/wait_for_pool.py

lab: $(VENV)/.lab $(VENV)/.extension
	jupyter lab

# Files are given out longest first (tests/conftest.py), so that none of them runs alone at the end.
test: $(VENV)/.test $(VENV)/.extension
	@python -c "$$FORECAST"
	python -m pytest -rs -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=25 $(ARGS)

test-quick: $(VENV)/.test $(VENV)/.extension
	@echo "Tests of short files without browser, cluster and hub: up to 3 minutes on two cores; make test runs all"
	python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not (slow or browser or cluster)" $(ARGS)

soak: $(VENV)/.test $(VENV)/.extension
	GPUPOOL_SOAK=1 python -m pytest -rs $(ARGS)

lint: $(VENV)/.test $(VENV)/.extension
	ruff check
	ruff format --check
	lint-imports --no-logo
	mypy
	jlpm lint
	jlpm tsc -p labextension/tsconfig.test.json

kubernetes: $(VENV)/.test
	tests/kubernetes/make_tools.sh $(KUBERNETES_TOOLS)
	GPUPOOL_KUBERNETES_TOOLS=$(KUBERNETES_TOOLS) python -m pytest -rs tests/kubernetes $(ARGS)

# The libraries of the extra `programs` come with everything they need; PyTorch stays as it is.
conformance: programs
	python -m benchmarks.conformance.sweep $(ARGS)

programs: $(VENV)/.programs
	PROGRAMS_RECORD=benchmarks/programs.json python -m pytest -rs tests/programs $(ARGS)

# Those of the README, of a JupyterLab that runs here.
pictures: $(VENV)/.test $(VENV)/.extension
	python -m pytest -n 0 -rs tests/ui/pictures.py

# Outside .ci/run: releases other than the pinned one are mostly builds for CUDA of several gigabytes.
torch-matrix: $(VENV)/.test
	python .make/torch_matrix.py $(TORCH) $(ARGS)

jax-matrix: $(VENV)/.test
	python .make/jax_matrix.py $(JAX) $(ARGS)

# In an environment of its own, .floors; PyTorch and JAX have matrices.
floors: $(BIN)/python
	@$(PYTHON) .make/floors.py $(ARGS)

lock:
	@$(PYTHON) .make/lock.py

# Every reference page is written from the code anew, so nothing is kept from the last build.
docs: $(VENV)/.docs
	sphinx-build -E -W --keep-going -n -q -b html docs docs/_build/html
	@echo "The site is in docs/_build/html/index.html"

docs-links: $(VENV)/.docs
	sphinx-build -q -b linkcheck docs docs/_build/linkcheck

bench: $(VENV)/.test $(VENV)/.extension
	python -m benchmarks $(ARGS)

# With whatever Python and PyTorch are here: a machine with a GPU may have no network to install anything from.
# Without a GPU `python -m benchmarks.gpu` exits with 77, and make reports that.
gpu:
	@$$(command -v python || command -v python3) -m benchmarks.gpu $(ARGS)

clean:
	rm -rf $(VENV) node_modules .yarn dist labextension/lib jupyter_gpupool/labextension
	rm -rf docs/_build .import_linter_cache .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "Python 3.10 or later is needed: say which with PYTHON=..., for example 'make demo PYTHON=python3.12'." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: install its venv package (python3-venv on Debian)." >&2; exit 1; }
	@echo "Creating the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# One environment; each stamp says which extras are in it.
$(VENV)/.demo: $(BIN)/python $(INSTALLED)
	@$(PYTHON) .make/install.py $(VENV) demo
	@touch $@

$(VENV)/.lab: $(BIN)/python $(INSTALLED)
	@$(PYTHON) .make/install.py $(VENV) lab
	@touch $@ $(VENV)/.demo

$(VENV)/.build: $(BIN)/python $(INSTALLED)
	@$(PYTHON) .make/install.py $(VENV) build$(NODE)
	@touch $@

$(VENV)/.test: $(BIN)/python $(INSTALLED)
	@$(PYTHON) .make/install.py $(VENV) test
	@touch $@ $(VENV)/.build $(VENV)/.docs $(VENV)/.lab $(VENV)/.demo

$(VENV)/.docs: $(BIN)/python $(INSTALLED)
	@$(PYTHON) .make/install.py $(VENV) docs
	@touch $@

$(VENV)/.programs: $(VENV)/.test $(INSTALLED)
	@$(PYTHON) .make/install.py $(VENV) test,programs
	@touch $@

# Built once, and again where its sources change.
$(EXTENSION): $(PANEL) package.json yarn.lock .make/hatch_build.py
	@$(MAKE) --no-print-directory $(VENV)/.build
	@echo "Building the JupyterLab extension: about a minute, and only where its sources have changed"
	@python .make/hatch_build.py 2>&1 | tee $(VENV)/extension.log | grep --line-buffered -v YN0013
	@touch $@

# JupyterLab finds it in the environment through a link.
$(VENV)/.extension: $(EXTENSION) $(BIN)/python
	@mkdir -p $(VENV)/share/jupyter/labextensions
	@ln -sfn $(CURDIR)/$(dir $(EXTENSION)) $(VENV)/share/jupyter/labextensions/jupyter-gpupool
	@touch $@
