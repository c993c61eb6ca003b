# `make` lists the targets. Everything is installed into .venv.

PYTHON ?= python3
# Installed before the rest, so that a pip whose configuration names an index of CPU builds takes one of those, and not gigabytes for GPUs.
# To name an index here:  make demo TORCH="torch==2.13.0 --index-url URL"
TORCH ?= torch==2.13.0

BIN = .venv/bin
# --no-compile: Python compiles the few modules that are used, when they are used, and keeps what it compiled. Where it is told not to keep
# it, as in many container images, every process compiles torch, Ray and MLflow anew, which takes longer than all else that it does to start.
unexport PYTHONDONTWRITEBYTECODE
PIP = $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check --constraint constraints.txt

# Two processes: the slow tests wait for other processes more than they compute. tests/conftest.py says which tests share one.
PYTEST = $(BIN)/python -m pytest -q -n 2 --dist loadgroup
SHORT = -m "not long"

.PHONY: help demo test check check-long chaos bench services clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: .venv/.installed ## Search a real problem in minutes: search_spaces/quickstart.yaml, and its best config
	@$(BIN)/study run search_spaces/quickstart.yaml
	@$(BIN)/study best quickstart
	@echo
	@echo "See every trial in MLflow:  $(BIN)/study ui"
	@echo "The best config is in       $${STUDY_HOME:-studies}/quickstart/best.yaml"

test: .venv/.installed ## Run the tests
	@$(PYTEST) $(SHORT)

check: .venv/.installed ## What CI runs: format, lint, types, imports, tests
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/ruff check --quiet
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache  # a cache does not notice that a module is new
	@$(PYTEST) $(SHORT)

check-long: .venv/.installed ## The tests that check leaves out: more of the same, and slow
	@$(PYTEST) -m long

chaos: .venv/.installed ## Kill workers, nodes, drivers and the tracking server of 40 studies: hours
	@$(BIN)/python -m tests.chaos --seeds 20

bench: .venv/.installed ## Measure our overhead, as ratios
	@$(BIN)/python -m tests.benchmarks.run

services: ## Start an MLflow server on PostgreSQL, on loopback, with docker compose; needs POSTGRES_PASSWORD
	@docker compose --file examples/services/compose.yaml up --detach --wait

bench-gpu: .venv/.installed ## Measure fused trials on a GPU, where there is one
	@$(BIN)/python -m tests.benchmarks.gpu

clean: ## Remove what make installed and cached; studies stay
	@rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11"; exit 1; }
	@echo "Installing into .venv: about 2 GB, a minute or two"
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(PIP) $(TORCH)
	@$(PIP) --editable '.[torch,service,cluster,dev]'
	@touch $@
