.DEFAULT_GOAL := help
.PHONY: help run demo test test-faults soak check coverage bench docs

PYTHON ?= python3
WORKERS ?= 3
MINUTES ?= 10
BIN := .venv/bin

# $(call prepare,extra,stamps): the environment with that extra, from the tested versions.
define prepare
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "Python 3.11 or later is needed; $(PYTHON) is older. Name another: make PYTHON=python3.12" >&2; exit 1; }
@echo "Preparing .venv (first time and after changes to pyproject.toml or constraints.txt; about a minute) ..."
@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear .venv
@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(1)]'
@touch $(2)
endef

# A stamp for each set, so that a first `make demo` does not wait for test tools; the second set includes the first.
.venv/.ready-to-run: pyproject.toml constraints.txt
	$(call prepare,example,.venv/.ready-to-run)

.venv/.ready-to-develop: pyproject.toml constraints.txt
	$(call prepare,dev,.venv/.ready-to-run .venv/.ready-to-develop)

.venv/.ready-to-bench: pyproject.toml constraints.txt
	$(call prepare,bench,.venv/.ready-to-bench)

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: .venv/.ready-to-run ## Migrate and serve the example on 127.0.0.1:8000 (HOST, PORT, DATABASE_URL change that)
	@$(BIN)/python -m example_service.app.main

demo: .venv/.ready-to-run ## Start the example on a free port, walk its requests, stop it; fails on a wrong answer
	@$(BIN)/python -m example_service.demo

test: .venv/.ready-to-develop ## Run all tests (REQUIRE_BACKENDS=postgres,... fails where one is missing; PORTABLE=1 without drivers' fast paths)
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadscope $(if $(PORTABLE),--portable)

test-faults: .venv/.ready-to-develop ## Break servers and connections as often as promised; prints a line for each promise
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadscope --full tests/faults

soak: .venv/.ready-to-develop ## Use and break all databases at once for MINUTES=10; fails on a wrong answer or a lost write
	@$(BIN)/python -m tests.soak --minutes $(MINUTES)

check: .venv/.ready-to-develop ## Lint, formatting, types (mypy strict), the architecture's import rules, branch coverage
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(MAKE) --no-print-directory coverage

# Measuring makes tests twice as slow, and the quick ones reach nearly every branch, where all databases are here.
MEASURE = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadscope -m "not slow" -r fE --no-header --quiet
coverage: .venv/.ready-to-develop ## Branch coverage of src by the quick tests (95 % is required if REQUIRE_BACKENDS is set)
	@$(MEASURE) --cov src/fastapi_building_blocks/api --cov-config tests/api/.coveragerc --cov-report= tests/api
	@$(MEASURE) --cov --cov-append --cov-report term:skip-covered --cov-fail-under $(if $(REQUIRE_BACKENDS),95,0) \
		tests/infrastructure tests/testing tests/faults/test_pgbouncer.py \
		tests/faults/test_replicas.py tests/faults/test_cache.py

bench: .venv/.ready-to-bench ## Compare with drivers, Core and peers (DB=sqlite OPS=get,page ROUNDS=3: a part; WRITE=1: into docs/)
	@$(BIN)/python -m benchmarks $(if $(DB),--db $(DB)) $(if $(OPS),--ops $(OPS)) $(if $(ROUNDS),--rounds $(ROUNDS)) \
		$(if $(WRITE),--write)

docs: .venv/.ready-to-develop ## Run the code blocks of README.md and docs/ (they are part of `make test` too)
	@$(BIN)/python -m pytest tests/docs
