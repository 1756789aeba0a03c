# Every target works from a fresh clone: the first one run makes the environment in .venv.
#
#   make demo    convert the embedded model, let both frameworks write, compare them, write a report
#   make test    the tests            PYTEST_ARGS="-n 0 -x tests/convert" narrows them
#   make check   format, lint, import contract, types
#   make bench   measure beside transformers, and write docs/performance.md
#   make docs    the documentation, to build/docs/index.html
#   make clean   remove what these made, except .venv
#
# Needs Python 3.11 or newer (PYTHON=... picks one) and a package index that pip can reach.

SHELL := /bin/bash
BIN := .venv/bin
STAMP := .venv/.installed
# python3.11 where it is there and starts, else python3.
PYTHON ?= $(shell python3.11 -c '' >/dev/null 2>&1 && echo python3.11 || echo python3)
# Two processes with one thread each are faster here than one process with two threads.
PYTEST_ARGS ?= -n 2

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test check bench docs clean

help:
	@sed -n 's/^#   //p' Makefile

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed; '$(PYTHON)' gives" \
	       "'$$($(PYTHON) -c 'import platform; print(platform.python_version())' 2>/dev/null || echo nothing)'." \
	       "Name another one: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[parity,dev]' -c constraints.txt
	@touch $@

demo: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(STAMP)
	scripts/check

bench: $(STAMP)
	$(BIN)/python -m benchmarks --write docs/performance.md

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -e '.[docs]' -c constraints.txt
	$(BIN)/python scripts/write_weight_map.py
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs build/docs
	@echo "To read: build/docs/index.html"

clean:
	rm -rf build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
