# Two commands: `make demo` serves the demo model, `make test` passes all tests. Both make .venv first.
PYTHON ?= python3
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The root of this repository is the package: with the root on sys.path, Python would find `kernels` and other folders
# of ours as top-level packages.
export PYTHONSAFEPATH := 1

.PHONY: demo test gpu-test lint clean

demo: $(STAMP)
	$(BIN)/penstock demo --port $(PORT)

test: $(STAMP)
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@# mypy names packages after folders, and this one may be cloned under any name
	@mkdir -p $(VENV)/tree && ln -sfn "$(CURDIR)" $(VENV)/tree/penstock
	MYPYPATH=$(VENV)/tree $(BIN)/mypy

# On a machine with a GPU, with the torch, Triton, transformers and pytest that $(PYTHON) has: nothing is installed.
# The last test fills half of the GPU, so it runs by itself.
GPU_TESTS = $(shell grep -lE '^(@|on_gpu = .)pytest.mark.gpu|triton_device import' tests/test_*.py)
GPU_PYTEST = PYTHONPATH="$(CURDIR)/$(VENV)/tree" $(PYTHON) -m pytest -o addopts=--import-mode=importlib -ra --disable-warnings -m gpu
define GPU_CHECK
import sys
from importlib.util import find_spec
needed = ("torch", "triton", "transformers", "psutil", "pytest", "xdist", "pytest_timeout")
if missing := [name for name in needed if find_spec(name) is None]:
    sys.exit(f"gpu-test: {sys.executable} lacks {', '.join(missing)}")
import torch
if not torch.cuda.is_available():
    sys.exit("gpu-test: torch finds no CUDA device here")
endef
export GPU_CHECK
gpu-test:
	@$(PYTHON) -c "$$GPU_CHECK"
	@mkdir -p $(VENV)/tree && ln -sfn "$(CURDIR)" $(VENV)/tree/penstock
	$(GPU_PYTEST) --numprocesses 8 $(filter-out tests/test_kv_budget.py, $(GPU_TESTS)); first=$$?; \
		$(GPU_PYTEST) tests/test_kv_budget.py && exit $$first

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; set PYTHON=path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# torch first and by itself: otherwise another package's wish decides which build of it comes
	$(BIN)/python -m pip install --quiet "torch>=2.11,<2.14"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) *.egg-info build
