# Every target sets up what it needs in .venv, on a machine with nothing but Python >= 3.11.
# Another interpreter: PYTHON=python3.12 make demo

.DEFAULT_GOAL := help
.PHONY: help demo test check lint types migrations wheel bench bench-large clean setup-demo setup-dev setup-bench

PYTHON ?=
export PYTHON
RUN := .venv/bin/python

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: setup-demo ## Run a whole chat round trip on an embedded PostgreSQL
	@$(RUN) examples/quickstart.py

test: setup-dev ## Run the tests
	$(RUN) -m pytest -n auto tests

check: lint types test migrations wheel ## Run everything that must pass before a release

lint: setup-dev ## Check style
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: setup-dev ## Check types
	$(RUN) -m mypy

migrations: setup-dev ## Test the migrations and look for dangerous locks in their SQL
	$(RUN) -m pytest -n 0 tests/test_migrations.py
	$(RUN) scripts/render_migrations.py build/migrations
	.venv/bin/squawk build/migrations/*.sql

wheel: setup-dev ## Build the wheel, install it into an empty environment and use it
	sh scripts/smoke_wheel.sh

bench: setup-bench ## Measure
	$(RUN) -m benchmarks

bench-large: setup-bench ## Measure how searches and recalls grow to a million (more than an hour)
	$(RUN) -m benchmarks.growth 10000 100000 1000000
	$(RUN) -m benchmarks.growth_of_memories 10000 100000 1000000

clean: ## Remove the environment and all build products; keep the data in .database
	rm -rf .venv .venv.lock build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup-demo setup-dev setup-bench: setup-%:
	@sh scripts/setup.sh $*
