# Two commands do all: `make demo` and `make test` make their own environment in .venv on first use.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# More arguments for pip, such as an index of CPU-only PyTorch wheels.
PIP_ARGS ?=
# pytest workers; each runs single-threaded, so this is the number of cores used.
JOBS ?= 2
PYTEST_ARGS ?=

.PHONY: demo test lint types format clean

demo: $(VENV)/.demo
	$(BIN)/haste demo

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The checkout keeps passes/ and kernels/ beside the package; type checkers want the installed layout.
types: $(VENV)/.dev
	rm -rf build/types && mkdir -p build/types/haste_compile
	ln -s $(CURDIR)/haste_compile/* $(CURDIR)/passes $(CURDIR)/kernels build/types/haste_compile/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file ../../pyproject.toml -p haste_compile

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist outputs .pytest_cache .ruff_cache .mypy_cache

# torch comes first and by its exact version, so that a CPU wheel the machine offers is the one taken.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(PIP_ARGS) torch==2.13.0
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) $(PIP_ARGS) --editable '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) $(PIP_ARGS) --editable '.[dev]'
	touch $@ $(VENV)/.demo
