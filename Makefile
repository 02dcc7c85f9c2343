# Everything here sets itself up: a virtual environment in .venv with the tested versions.
# Needs python3 (3.10 or newer), make, and a package index.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Processes that test; each takes a core and up to 2 GB.
WORKERS ?= 2

.PHONY: demo test check format bench report kernels test-engines clean

demo: $(READY)  ## convert a real language model to INT8 and INT4 and let it answer
	TQDM_DISABLE=1 $(BIN)/python -m benchmarks.demo

test: $(READY)  ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

check: $(READY)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)  ## put the code in order
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)  ## measure converting, running and quality, then render the report; needs 40 GB of disk and some hours
	$(BIN)/python -m benchmarks.convert
	$(BIN)/python -m benchmarks.runtimes
	$(BIN)/python -m benchmarks.quality
	$(BIN)/python -m benchmarks.report

report: $(READY)  ## only render benchmarks/REPORT.md from benchmarks/results
	$(BIN)/python -m benchmarks.report

kernels: $(READY)  ## CUDA kernels for every architecture in one file, with nvcc; without it they are compiled on first use
	$(BIN)/python -m glmquant._cuda.build

test-engines: $(READY)  ## load converted checkpoints in real engines, in environments of their own
	$(BIN)/python -m tests.engines

# torch goes first and pinned. Whether the build has CUDA depends on the package index; nothing here needs it, so
# where it matters: make TORCH_INDEX=https://download.pytorch.org/whl/cpu
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	touch $@

clean:
	rm -rf $(VENV) demo build dist .mypy_cache .ruff_cache .pytest_cache
