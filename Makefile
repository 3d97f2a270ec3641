# demo, test, check and wheel set up a virtual environment when there is none, and test-torch one per version of torch;
# test-gpu and bench use the Python they find ($(PYTHON)) and never install anything. All but demo build the native library
# before (csrc/build.py), unless it is up to date; without a C++ compiler they say so and go on.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
OUT ?= demo-out
BENCH_ARGS ?=
# What make trust runs: the folder of its results, then options.
TRUST ?= trust-out
# What csrc/build.py gets. `make test NATIVE=` makes a missing compiler an error.
NATIVE ?= --optional
TORCH ?= 2.11.0

.PHONY: help demo test test-all test-nightly test-defects check native wheel test-torch test-gpu trust bench docs hashes
# Which planted defects test-defects tries: others for another key.
KEY ?= $(shell git rev-parse HEAD 2>/dev/null || date +%G-W%V)
help:
	@echo "make demo      set everything up and train the small ViT dense, sparse then dense, and fully sparse"
	@echo "make test      set everything up and run the tests"
	@echo "make test-all  all of the cases of which 'make test' runs some"
	@echo "make test-defects  plant a tenth of the defects in a copy of the tree and see whether the tests find them"
	@echo "make test-nightly  test-all, then all faults and all planted defects"
	@echo "make check     format, lint, types and import levels"
	@echo "make native    build the native library (C++ compiler needed); make test and make check do that too"
	@echo "make hashes    write hashes/ anew, after a change of constraints*.txt"
	@echo "make wheel     build the sdist into dist, and the wheel with the native library from it"
	@echo "make test-torch TORCH=2.11.0   run README, types and the tests of the ops from the wheel with another torch, in an environment of its own"
	@echo "make test-gpu  run the GPU tests with $(PYTHON) and write tests/gpu_record.json"
	@echo "make trust     run what takes long on a GPU with $(PYTHON); TRUST='trust-out --parts leaks' chooses parts"
	@echo "make docs      build the site of the documentation into site/, with every warning as an error"
	@echo "make bench     run the benchmarks with $(PYTHON) and write benchmarks/results"

# pip's own output shows progress: a bar on a terminal, lines in a pipe.
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Every package but torch, which comes in builds with hashes and packages of their own, and this checkout, which has none.
HASHED := --require-hashes --no-deps

$(READY): pyproject.toml lab/pyproject.toml $(wildcard constraints*.txt hashes/*.txt)
	@echo "setup: makes $(VENV) with $(PYTHON), then pip downloads and installs PyTorch and about 100 other packages there."
	@echo "setup: 2 GB on disk; two or three minutes on a fast connection, longer on a slow one; no sudo, nothing outside $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(HASHED) -r hashes/constraints.txt
	$(PIP) install --no-build-isolation -c constraints.txt -e '.[dev]' -e './lab[text]'
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install $(HASHED) -r hashes/constraints-triton.txt
	$(PIP) install $(HASHED) -r hashes/constraints-torchtitan.txt
	@touch $(READY)
	@echo "setup: done; it is not repeated until the lists of packages change"

demo: $(READY)
	@echo "demo: trains three small ViTs, half a minute to a minute on two CPU cores; table here, curves and checkpoints in $(OUT)"
	$(BIN)/semisparse-lab train --out $(OUT) --force

native: $(READY)
	$(BIN)/python csrc/build.py $(NATIVE)

test: native
	@echo "test: no GPU needed; about nine minutes on two cores; pytest prints a dot per test"
	$(BIN)/python -m pytest -q -n auto

test-all: native
	@echo "test-all: every case that the interpreter can run, all kernels compiled for three architectures, leaks; half an hour"
	SEMISPARSE_EVERY_CASE=1 $(BIN)/python -m pytest -q -n auto

test-defects: $(READY)
	@echo "test-defects: plants a tenth of the defects of tests/defects, chosen by $(KEY), and looks whether tests see them"
	$(BIN)/python tests/defects/run.py --turn "$(KEY)" --keep-record

test-nightly: native
	@echo "test-nightly: every case, then all faults and all planted defects, one at a time; an hour on two cores"
	SEMISPARSE_EVERY_CASE=1 $(BIN)/python -m pytest -q -n auto
	$(BIN)/python tests/faults/run.py
	$(BIN)/python tests/defects/run.py
	$(BIN)/python tests/reliability.py

check: native
	@echo "check: format, lint, types, import levels; about half a minute"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/arch/test_layers.py tests/arch/test_lab_imports.py

# After a change of constraints*.txt; hashin asks PyPI for the hashes of all files of each version. It has an environment of its
# own, because that of the tests is made with these hashes.
hashes:
	$(PYTHON) -m venv .venv-hashin
	.venv-hashin/bin/python -m pip --disable-pip-version-check install hashin==1.0.5
	for pins in constraints*.txt; do \
	    : > .venv-hashin/$$pins; \
	    .venv-hashin/bin/hashin -r .venv-hashin/$$pins $$(sed 's/#.*//' $$pins | grep == | grep -v '^torch==') || exit 1; \
	    mv .venv-hashin/$$pins hashes/$$pins; \
	done

# The wheel is built from the sdist, as pip does where no wheel fits.
wheel: $(READY)
	rm -rf dist
	$(BIN)/python -m hatchling build -t sdist
	SEMISPARSE_BUILD_NATIVE=1 $(PIP) wheel --verbose --no-build-isolation --no-deps --wheel-dir dist dist/*.tar.gz

$(VENV)/.docs: $(READY)
	$(PIP) install --no-build-isolation -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs
	rm -rf site
	$(BIN)/python -m sphinx -c docs -b html -q -W --keep-going . site
	@echo "docs: open site/index.html"

# The wheel is built with the torch of $(VENV) and must serve this one. pip takes torch from PyPI, with the CUDA libraries that
# it loads: 5 GB on disk. The other pins and their hashes are those of $(VENV), but for setuptools, of which each torch wants
# other versions.
OTHER := .venv-torch-$(TORCH)
BESIDE_TORCH := numpy nvmath-python cuda-bindings cuda-core cuda-pathfinder hatchling pathspec pluggy trove-classifiers packaging \
    pytest iniconfig pygments pytest-xdist execnet hypothesis sortedcontainers filelock typing-extensions sympy mpmath networkx \
    jinja2 markupsafe fsspec tomlkit
$(OTHER)/.ready: constraints.txt hashes/constraints.txt
	@echo "setup: makes $(OTHER) with torch $(TORCH) and its CUDA libraries; 5 GB on disk, about a minute on a fast connection"
	$(PYTHON) -m venv $(OTHER)
	grep -v -e '^torch==' -e '^setuptools==' constraints.txt > $(OTHER)/constraints.txt
	awk -v names=" $(BESIDE_TORCH) " '/^[^ ]/ { split($$1, name, "=="); chosen = index(names, " " tolower(name[1]) " ") } chosen' \
	    hashes/constraints.txt > $(OTHER)/hashes.txt
	$(OTHER)/bin/python -m pip --disable-pip-version-check install $(HASHED) -r $(OTHER)/hashes.txt
	PIP_CONSTRAINT=$(OTHER)/constraints.txt $(OTHER)/bin/python -m pip --disable-pip-version-check install \
	    torch==$(TORCH) $(BESIDE_TORCH)
	@touch $@

# pyright and the node that it runs on: 250 MB on disk, so in an environment of their own, which the tests do not need.
PYRIGHT := .venv-pyright
$(PYRIGHT)/.ready: hashes/constraints-pyright.txt
	$(PYTHON) -m venv $(PYRIGHT)
	$(PYRIGHT)/bin/python -m pip --disable-pip-version-check install $(HASHED) -r hashes/constraints-pyright.txt
	@touch $@

test-torch: wheel $(OTHER)/.ready $(PYRIGHT)/.ready
	$(OTHER)/bin/python -m pip --disable-pip-version-check install --no-deps --force-reinstall dist/*.whl
	@echo "test-torch: types that a user's program sees of the installed wheel"
	$(PYRIGHT)/bin/pyright -p tests/typed/pyrightconfig.json --pythonpath $(OTHER)/bin/python
	@echo "test-torch: README's examples, and tests of the ops, with torch $(TORCH) and the installed wheel; about a minute on two cores"
	# Without the sanitizers, the stress program and kernels in the interpreter, which do not depend on the torch beside them.
	SEMISPARSE_REQUIRE_NATIVE=1 $(OTHER)/bin/python -m pytest -q -n auto -o pythonpath=. tests/native tests/ops tests/functional \
		'tests/arch/test_docs_examples.py::test_the_examples_of_a_page_run[README.md]' \
		--ignore=tests/native/test_sanitized.py --ignore=tests/native/test_stress.py \
		--ignore=tests/ops/test_cuda_side.py --ignore=tests/ops/test_cuda_fp8.py
	@echo "test-torch: compiles the kernels for a GPU that need not be there"
	PYTHONPATH=. $(OTHER)/bin/python tests/kernels/compiling.py 90 8 > $(OTHER)/kernels.json

test-gpu:
	$(PYTHON) csrc/build.py $(NATIVE)
	PYTHONPATH=src:lab/src SEMISPARSE_REQUIRE_GPU=1 $(PYTHON) tests/record_gpu.py

trust:
	$(PYTHON) csrc/build.py $(NATIVE)
	PYTHONPATH=src:lab/src:. $(PYTHON) -m tests.trust $(TRUST)

bench:
	$(PYTHON) csrc/build.py $(NATIVE)
	PYTHONPATH=src:lab/src:. $(PYTHON) benchmarks/benchmark_semi_structured_training.py --host --save $(BENCH_ARGS)
	PYTHONPATH=src:lab/src:. $(PYTHON) benchmarks/benchmark_semi_structured_training.py --pack --save $(BENCH_ARGS)
	PYTHONPATH=src:lab/src:. $(PYTHON) benchmarks/benchmark_semi_structured_training.py --metrics --save $(BENCH_ARGS)
	rm -rf bench-out
	PYTHON=$(PYTHON) bash benchmarks/runs/fresh.sh bench-out; code=$$?; cp bench-out/*.json bench-out/*.csv benchmarks/results; exit $$code
