# make help    lists what there is
#
# Where the commands run:
#   PYTHON=... given        that interpreter, as it is; nothing is installed
#   an active environment   that one, if it has torch >= 2.11 and the other packages
#   otherwise               .venv, made here and kept up to date with pyproject.toml

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

BOOTSTRAP ?= python3
EXTRAS ?= dev,wandb,tensorboard,hf
# Without an NVIDIA GPU the CPU wheel comes first, so that pip does not fetch gigabytes of CUDA libraries. If your index keeps
# CPU wheels at another address, pass TORCH='torch==2.13.0 --index-url ADDRESS'.
TORCH ?= torch==2.13.0
ARGS ?=

ifdef PYTHON
  READY :=
else
  ACTIVE := $(if $(VIRTUAL_ENV)$(CONDA_PREFIX),$(shell python tools/environment_suits.py 2>/dev/null))
  ifneq ($(ACTIVE),)
    PYTHON := $(ACTIVE)
    READY :=
  else
    PYTHON := .venv/bin/python
    READY := .venv/up-to-date
  endif
endif

.PHONY: help demo test slow slurm lint format gpu-check install clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## train a small model on real text with 4 processes, kill it, resume it, sample from it (minutes)
	$(PYTHON) -m lctrain demo $(ARGS)

test: $(READY) ## every test that does not take minutes; ARGS='-k ring -x' goes to pytest
	$(PYTHON) -m pytest $(ARGS)

slow: $(READY) ## the tests that take minutes
	$(PYTHON) -m pytest -m slow $(ARGS)

slurm: ## a real SLURM on this Debian machine for the tests of launcher=slurm (once, as root)
	tools/slurm_lab.sh install

lint: $(READY) ## style, types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy -p lctrain

format: $(READY) ## rewrite the sources in the project's style
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

gpu-check: $(READY) ## what needs a GPU, on this machine's
	$(PYTHON) tools/gpu_check.py $(ARGS)

install: $(READY) ## the environment alone
	@echo "run: $(PYTHON) -m lctrain --help"

.venv/up-to-date: pyproject.toml
	$(BOOTSTRAP) -c 'import sys; sys.exit("python 3.11 or newer is needed: make BOOTSTRAP=python3.12 ...") if sys.version_info < (3, 11) else None'
	test -x .venv/bin/python || $(BOOTSTRAP) -m venv .venv
	command -v nvidia-smi >/dev/null || .venv/bin/python -m pip install --quiet $(TORCH)
	.venv/bin/python -m pip install --quiet -e '.[$(EXTRAS)]'
	@touch $@

clean: ## caches and build leftovers; runs/, corpora/ and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
