# The verbs of this project. Every one creates .venv if need be; none needs anything but Python >= 3.11 and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RECAST := $(BIN)/recast
DEMO   := runs/demo
# a test file stays with one worker, which shares what its tests share; each takes about 2 GB
WORKERS := --numprocesses=auto --maxprocesses=4 --dist=loadfile

.PHONY: demo test slow check format bench pocket clean

demo: $(VENV)/.installed
	$(RECAST) demo --out $(DEMO)

test: $(VENV)/.tests
	$(BIN)/python -m pytest $(WORKERS)

slow: $(VENV)/.tests
	$(BIN)/python -m pytest $(WORKERS) -m slow

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(patsubst bench/%.py,bench-%,$(filter-out bench/_%,$(wildcard bench/*.py)))

bench-%: $(VENV)/.tests
	$(BIN)/python bench/$*.py

# Train the two pocket checkpoints again (about 2 hours on one core; resumable).
pocket: $(VENV)/.installed
	$(BIN)/python -m recast.pocket

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.tests: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

$(VENV)/.dev: $(VENV)/.tests
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,dev]'
	touch $@

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache build
