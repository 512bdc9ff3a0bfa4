# make serve              install and start the service          make serve ARGS='--port 9000' MODEL=smollm2
# make check              check format, lint, types and imports
# make test               run all tests                          make test PYTEST='-k ledger'
# make test-unit          tests/unit: SQLite and the in-process broker
# make test-integration   tests/integration: also PostgreSQL and Redis
# make test-e2e           tests/e2e: processes, crashes and the console in a browser
# make test-docs          tests/docs: the documentation, executed
# make bench              run every benchmark in its quick mode  make bench ARGS='--reference PATH --only edits traces'
# make format             format and fix the code
# make pins               pin the indirect dependencies         make pins ARGS=--upgrade
# make audit              look up the pinned versions in a database of known vulnerabilities

# The first python3 of version 3.11 or newer.
PYTHON := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
STAMP := .venv/.installed
PACKAGES := palimpsest service api workers cli migrations deploy examples tests bench training docs
# One process per core, one thread each. Tests of a file run in one process because they share module-scoped services.
# A crashed process is not replaced: after a replacement xdist does not report the failures of the others.
# Bytecode is written even where the environment forbids it: each process of the service would compile every module.
TESTS := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --max-worker-restart 0 \
	--dist loadfile --no-loadscope-reorder -m "not slow"
# Build dependencies are pinned too. The first variable is for pip before 25.3, the second for later ones.
CONSTRAINED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
AUDIT := .venv/audit
ARGS ?=
MODEL ?=
PYTEST ?=

.DEFAULT_GOAL := help
TIERS := unit integration e2e docs

.PHONY: help install serve test $(TIERS:%=test-%) check bench format pins audit clean

help:
	@sed -n 's/^# make/make/p' Makefile

install: $(STAMP)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer was found."; exit 1; }
	$(PYTHON) -m venv .venv

# Reinstall when the dependencies have changed.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into .venv. The first time this takes some minutes."
	@$(CONSTRAINED) $(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

# MODEL: a folder, a GGUF file, or the name of a known model, which is fetched where it is not here.
serve: install
	@if [ -n "$(MODEL)" ] && [ ! -e "$(MODEL)" ]; then $(BIN)/palimpsest fetch --if-known "$(MODEL)"; fi
	@exec $(BIN)/palimpsest serve $(if $(MODEL),--model "$(MODEL)") $(ARGS)

test: install
	$(TESTS) $(PYTEST)

$(TIERS:%=test-%): test-%: install
	$(TESTS) tests/$* $(PYTEST)

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

pins: install
	@$(CONSTRAINED) $(BIN)/python deploy/pins.py $(ARGS)

$(AUDIT)/bin/pip-audit: constraints.txt | $(BIN)/python
	$(BIN)/python -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install -q -c constraints.txt pip-audit

# Exit code 1: a version has a known vulnerability. 2: nothing could be looked up.
audit: $(AUDIT)/bin/pip-audit
	@$(BIN)/python deploy/audit.py $(AUDIT)/bin/pip-audit

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
