# `make help` lists the targets. Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install protos released check test bench bench-gpu demo clean

help: ## List the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) ## Create .venv and install Reverie with every service and development tool (CPU torch).

$(INSTALLED): pyproject.toml constraints/cpu.txt
	@echo "Installing Reverie and its tools into $(VENV): one to three minutes, once."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --prefer-binary -c constraints/cpu.txt -c constraints/lock.txt -e '.[dev]'
	@touch $@

protos: $(INSTALLED) ## Generate protos/gen from protos/reverie.
	$(BIN)/python protos/generate.py

released: $(INSTALLED) ## Make today's protos the ones that later changes must not break.
	$(BIN)/buf build -o protos/released.binpb

check: $(INSTALLED) ## Lint, types, import rules, protos.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/buf lint
	$(BIN)/buf breaking --against protos/released.binpb
	$(BIN)/python protos/generate.py --check

# Two files at a time, the long ones first: much of the suite waits for processes to start and stop.
test: check ## Every check and every test.
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

bench: $(INSTALLED) ## Ratios against the peer or the physical limit, measured in one run.
	$(BIN)/python -m tests.bench

bench-gpu: $(INSTALLED) ## Training steps of the full-size model on a GPU, beside diffusers; under 10 minutes.
	$(BIN)/python tests/bench/gpu.py --out docs/figures/gpu/$$(date -u +%Y-%m-%d).json

demo: $(INSTALLED) ## The main job, end to end, on this machine: results in demo-output/.
	$(BIN)/python examples/quickstart/demo.py

clean: ## Remove what the other targets made.
	rm -rf $(VENV) demo-output .pytest_cache .mypy_cache .ruff_cache
