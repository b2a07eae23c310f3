# Everything a person or CI does with this repository. `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help setup demo test check format schema bench lock clean

help: ## list these targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: .venv/.installed ## make .venv and install the pinned set (again only when a pin changed)

.venv/.installed: requirements-bootstrap.txt requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "setup: torch and uv (pip)"; $(BIN)/pip install -q --disable-pip-version-check -r requirements-bootstrap.txt
	@echo "setup: requirements.lock (uv)"; VIRTUAL_ENV=.venv $(BIN)/uv pip install -q -r requirements.lock
	@VIRTUAL_ENV=.venv $(BIN)/uv pip install -q --no-deps --no-build-isolation -e .
	@touch $@

demo: setup ## run a seeded hub on this machine (CHECK=1: do the main job headless; SMOLLM=1: add a chat model)
	@$(BIN)/python manage.py demo $(if $(CHECK),--check) $(if $(SMOLLM),--smollm)

test: setup ## run the whole test suite: SQLite, then the database tests again on PostgreSQL
	@$(BIN)/python scripts/run_tests.py

check: setup ## lint, types, import contracts, templates, migrations
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/check.sh

format: setup ## rewrite the code as the formatter wants it
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix --select I .

schema: setup ## write docs/openapi.yaml again
	@DEBUG=1 $(BIN)/python manage.py spectacular --file docs/openapi.yaml

bench: setup ## compress, verify and score the demo models with the command line on this machine
	@for task in dates extraction; do $(BIN)/python benchmarks/pair.py --base examples/tiny-llama/backbone \
		--tuned examples/tiny-llama/$$task --out docs/benchmarks/tiny_llama_$$task.json; done

lock: setup ## resolve requirements.lock again
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --extra hub --extra worker --extra demo \
		--override requirements-torch.override --no-emit-package torch \
		--custom-compile-command "make lock" pyproject.toml requirements-dev.in -o requirements.lock

clean: ## remove the demo's data and every cache, keep .venv
	rm -rf var .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
