# On a fresh machine: `make demo` runs the main job, `make test` passes the tests.
# Both install everything they need into .venv first.
PYTHON ?= python3
VENV ?= .venv
# The release that the tests run with; e.g. TORCH="torch --index-url https://.../whl/cpu" for another build.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test slow lint format bench clean

demo: $(INSTALLED)
	$(BIN)/dynaconv demo

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow"

slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python benchmarks/run.py

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[app,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info
