# `make help` lists what there is. MAX_JOBS=N limits how many files are compiled at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo test test-all bench lint format clean

help:
	@echo "make demo      set up .venv if it is missing and run the whole pipeline on digits"
	@echo "make test      set up .venv if it is missing and run every test but the slow ones"
	@echo "make test-all  every test"
	@echo "make bench     the benchmarks"
	@echo "make lint      ruff, clang-format and mypy"
	@echo "make format    let ruff and clang-format rewrite the files"
	@echo "make clean     remove .venv and everything that was built"

# An editable install: Python files need no new install, a change of anything compiled does.
$(INSTALLED): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch torchvision \
		setuptools wheel pybind11 ninja
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/limpq run --out runs/digits

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow"

test-all: $(INSTALLED)
	$(BIN)/python -m pytest

bench: $(INSTALLED)
	$(BIN)/python -m pytest bench --benchmark-only

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build dist *.egg-info limpq_ext/*.so limpq_ext/_build.py
