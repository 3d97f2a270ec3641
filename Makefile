# Five verbs. demo, test and check set up their own virtual environment when there is none; test-gpu and bench use the
# Python they find ($(PYTHON)) and never install anything.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
OUT ?= demo-out
BENCH_ARGS ?=

.PHONY: help demo test check test-gpu bench
help:
	@echo "make demo      set everything up and train the small ViT dense, sparse then dense, and fully sparse"
	@echo "make test      set everything up and run the tests"
	@echo "make check     format, lint, types and import levels"
	@echo "make test-gpu  run the GPU tests with $(PYTHON) and write tests/gpu_record.json"
	@echo "make bench     run the benchmarks with $(PYTHON) and write benchmarks/results"

# pip's own output shows progress: a bar on a terminal, lines in a pipe.
PIP := $(BIN)/python -m pip --disable-pip-version-check

$(READY): pyproject.toml lab/pyproject.toml constraints.txt constraints-triton.txt
	@echo "setup: makes $(VENV) with $(PYTHON), then pip downloads and installs PyTorch and about 60 other packages there."
	@echo "setup: 2 GB on disk; two or three minutes on a fast connection, longer on a slow one; no sudo, nothing outside $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e '.[dev]' -e ./lab
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install -r constraints-triton.txt
	@touch $(READY)
	@echo "setup: done; it is not repeated until the lists of packages change"

demo: $(READY)
	@echo "demo: trains three small ViTs, half a minute to a minute on two CPU cores; table here, curves and checkpoints in $(OUT)"
	$(BIN)/semisparse-lab train --out $(OUT) --force

test: $(READY)
	@echo "test: no GPU needed; about six minutes on two cores; pytest prints a dot per test"
	$(BIN)/python -m pytest -q -n auto

check: $(READY)
	@echo "check: format, lint, types, import levels; about half a minute"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/arch/test_layers.py tests/arch/test_lab_imports.py

test-gpu:
	PYTHONPATH=src:lab/src SEMISPARSE_REQUIRE_GPU=1 $(PYTHON) tests/record_gpu.py

bench:
	PYTHONPATH=src:lab/src:. $(PYTHON) benchmarks/benchmark_semi_structured_training.py --linear --save $(BENCH_ARGS)
	PYTHONPATH=src:lab/src:. $(PYTHON) benchmarks/benchmark_semi_structured_training.py --no-gain --save $(BENCH_ARGS)
	PYTHONPATH=src:lab/src:. $(PYTHON) benchmarks/benchmark_semi_structured_training.py --pack --save $(BENCH_ARGS)
	PYTHONPATH=src:lab/src:. $(PYTHON) benchmarks/benchmark_semi_structured_training.py --metrics --save $(BENCH_ARGS)
	PYTHONPATH=src:lab/src:. $(PYTHON) benchmarks/benchmark_semi_structured_training.py --save $(BENCH_ARGS)
