# `make help` lists what there is. MAX_JOBS=N limits how many files are compiled at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

WORKERS ?= 2

# Of `make test-torch`: another torch, with which the wheel that .venv built is tested.
TORCH ?= 2.11.0
TORCHVISION ?= 0.26.0
OTHER := .venv-torch-$(TORCH)
# What depends on torch: operators, bank, joint step, prepare, pipeline and compilers.
TORCH_TESTS := tests/kernels tests/conversion/test_prepare.py tests/conversion/test_apply.py \
	tests/joint/test_trainer.py tests/joint/test_cuda_graph.py tests/app/test_trainings.py \
	tests/export/test_qcdq.py tests/export/test_packed.py tests/export/test_torch_export.py

.PHONY: help demo test test-all test-torch dist bench lint format clean

help:
	@echo "make demo       set up .venv if it is missing and run the whole pipeline on digits"
	@echo "make test       set up .venv if it is missing and run every test but the slow ones"
	@echo "make test-all   every test"
	@echo "make test-torch TORCH=2.11.0 TORCHVISION=0.26.0"
	@echo "                the wheel that .venv built, tested beside another torch"
	@echo "make dist       the source distribution and the wheel, in dist/"
	@echo "make bench      the benchmarks"
	@echo "make lint       ruff, clang-format and mypy"
	@echo "make format     let ruff and clang-format rewrite the files"
	@echo "make clean      remove .venv and everything that was built"

# An editable install: Python files need no new install, a change of anything compiled does.
$(INSTALLED): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch torchvision setuptools wheel ninja
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps compressed-tensors
	touch $@

dist: dist/built

# The wheel's tag says which Linux it runs on; torch's own libraries stay torch's.
dist/built: $(INSTALLED) MANIFEST.in $(shell find limpq_ext -name '*.py' -o -name '*.yaml')
	rm -rf dist
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m build --no-isolation --outdir dist/plain
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist \
		--exclude 'libc10*' --exclude 'libtorch*' --exclude 'libcudart*' dist/plain/*.whl
	mv dist/plain/*.tar.gz dist && rm -r dist/plain
	touch $@

test-torch: dist/built
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	grep -v -e '^torch' constraints.txt > $(OTHER)/constraints.txt
	$(OTHER)/bin/python -m pip install --quiet -c $(OTHER)/constraints.txt \
		torch==$(TORCH) torchvision==$(TORCHVISION) pytest pytest-xdist hypothesis "$$(echo dist/*.whl)[cli,timm,export]"
	$(OTHER)/bin/python -m pip install --quiet --force-reinstall --no-deps dist/*.whl
	cd $(OTHER) && bin/python -c "import torch; from limpq_ext.kernels.ops import build_info; print(torch.__version__, build_info())"
	OMP_NUM_THREADS=1 $(OTHER)/bin/pytest -n $(WORKERS) --dist loadfile -m "not slow" $(TORCH_TESTS)

demo: $(INSTALLED)
	$(BIN)/limpq run --out runs/digits

# A test module to a process, one thread each: small networks gain nothing from more threads.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

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
	rm -rf $(VENV) .venv-torch-* build dist *.egg-info limpq_ext/kernels/*.so
