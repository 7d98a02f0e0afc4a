# fit: DINO on real images in a few minutes.  test: lint, types, site and tests.  docs: the site.  bench: costs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: fit test docs bench
fit: $(VENV)/installed
	$(BIN)/python examples/fit_digits.py $(ARGS)

test: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(MAKE) docs
	$(BIN)/python -m pytest $(ARGS)

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
