# On a fresh machine: `make demo` runs the main job, `make test` passes the tests.
# Both install everything they need into .venv first.
PYTHON ?= python3
VENV ?= .venv
# The release that the tests run with; e.g. TORCH="torch --index-url https://.../whl/cpu" for another build.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NATIVE := src/dynaconv/backends/native
BUILT := $(VENV)/.built
# A second environment: other people's models, and the torch that comes with them.
INTEROP ?= .venv-interop

.PHONY: demo test slow interop lint format bench wheel clean

demo: $(BUILT)
	$(BIN)/dynaconv demo

test: $(BUILT)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not interop"

slow: $(BUILT)
	$(BIN)/python -m pytest -m slow

interop: $(INTEROP)/.installed
	OMP_NUM_THREADS=1 $(INTEROP)/bin/python -m pytest -m interop tests/interop

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BUILT)
	$(BIN)/python benchmarks/run.py

# The library goes into the wheel: one that lacks it is not what was asked for.
wheel: $(INSTALLED)
	DYNACONV_BUILD=1 $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

# Where there is no C++ compiler this says so, and everything works on the eager path.
$(BUILT): $(INSTALLED) $(NATIVE)/build.py $(wildcard csrc/*.* csrc/kernels/*.*)
	-$(BIN)/python -m dynaconv.backends.native && touch $@

$(INSTALLED): pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	DYNACONV_BUILD=0 $(BIN)/python -m pip install --quiet --editable ".[app,dev]"
	touch $@

$(INTEROP)/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/python -m pip install --quiet --upgrade pip
	DYNACONV_BUILD=0 $(INTEROP)/bin/python -m pip install --quiet --editable . \
		timm torchvision segmentation-models-pytorch ultralytics \
		onnx onnxruntime onnxscript onnxslim pytest hypothesis
	touch $@

clean:
	rm -rf $(VENV) $(INTEROP) build dist src/*.egg-info $(NATIVE)/objects $(NATIVE)/*.so
