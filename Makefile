# fit: DINO on real images in a few minutes.  test: lint, types, site and tests.  test-fast: tests of 90 seconds.
# lint: style and types.  docs: the site.  bench: costs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: fit test test-fast lint docs bench
fit: $(VENV)/installed
	$(BIN)/python examples/fit_digits.py $(ARGS)

test: lint docs
	$(BIN)/python -m pytest $(ARGS)

test-fast: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow and not distributed" $(ARGS)

lint: $(VENV)/installed
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy

docs: $(VENV)/installed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs

bench: $(VENV)/installed
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python benchmarks/callbacks.py
	$(BIN)/python benchmarks/watching.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/objective.py $(ARGS)

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $@
