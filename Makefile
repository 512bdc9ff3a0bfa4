# make serve    install and start the service       make serve ARGS='--port 9000'
# make test     install, check and test             make test PYTEST='-k ledger'
# make bench    every benchmark, quick           make bench ARGS='--reference PATH --only edits traces'
# make check    format, lint, types, import contract

# The first python3 on this machine that is new enough.
PYTHON := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
STAMP := .venv/.installed
PACKAGES := palimpsest service api workers cli migrations deploy examples tests bench training docs
# A process for each core, with a thread each; a file's tests stay in one, for they share what they have put up. One that dies
# is not replaced: xdist stumbles over that and keeps to itself what else has failed.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --max-worker-restart 0 \
	--dist loadfile --no-loadscope-reorder
ARGS ?=
PYTEST ?=

.DEFAULT_GOAL := help
.PHONY: help install serve test test-all check bench format clean

help:
	@sed -n 's/^# //p' Makefile

install: $(STAMP)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and none was found."; exit 1; }
	$(PYTHON) -m venv .venv

# The stamp is older than what it was made from exactly when there is something to install.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into .venv, which takes some minutes the first time."
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

serve: install
	@exec $(BIN)/palimpsest serve $(ARGS)

test: install check
	$(TESTS) -m "not slow and not gpu" $(PYTEST)

test-all: install check
	$(TESTS) $(PYTEST)

check: install
	$(BIN)/ruff format --check --quiet $(PACKAGES)
	$(BIN)/ruff check --quiet $(PACKAGES)
	$(BIN)/mypy --no-error-summary
	$(BIN)/lint-imports --no-logo

bench: install
	@$(BIN)/python bench/suite.py $(ARGS)

format: install
	$(BIN)/ruff format --quiet $(PACKAGES)
	$(BIN)/ruff check --quiet --fix $(PACKAGES)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
