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

$(READY): pyproject.toml lab/pyproject.toml constraints.txt constraints-triton.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' -e ./lab
	$(BIN)/python -c 'import triton' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -r constraints-triton.txt
	touch $(READY)

demo: $(READY)
	$(BIN)/semisparse-lab train --out $(OUT) --force

test: $(READY)
	$(BIN)/python -m pytest -q -n auto

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/arch/test_layers.py

test-gpu:
	PYTHONPATH=src:lab/src SEMISPARSE_REQUIRE_GPU=1 $(PYTHON) tests/record_gpu.py

bench:
	PYTHONPATH=src:lab/src:. $(PYTHON) benchmarks/benchmark_semi_structured_training.py --linear --save $(BENCH_ARGS)
	PYTHONPATH=src:lab/src:. $(PYTHON) benchmarks/benchmark_semi_structured_training.py --no-gain --save $(BENCH_ARGS)
	PYTHONPATH=src:lab/src:. $(PYTHON) benchmarks/benchmark_semi_structured_training.py --pack --save $(BENCH_ARGS)
	PYTHONPATH=src:lab/src:. $(PYTHON) benchmarks/benchmark_semi_structured_training.py --metrics --save $(BENCH_ARGS)
	PYTHONPATH=src:lab/src:. $(PYTHON) benchmarks/benchmark_semi_structured_training.py --save $(BENCH_ARGS)
