# make demo, make test: everything from a bare checkout. The environment lives in .venv.
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS ?= constraints.txt
TORCH ?= 2.15.0
# A stale extension left by another configuration must not be picked up: csrc is a prerequisite.
SOURCES := fastdeq/constants.py csrc/generate_constants.py csrc/toolchain.py \
	$(shell find csrc -name "*.cpp" -o -name "*.h" -o -name "*.cu" -o -name "*.cuh")

.PHONY: setup demo study test test-kernels test-torch cuda-build coverage bench gpu lint format docs clean

setup: .venv/.ready

.venv/.ready: pyproject.toml setup.py $(CONSTRAINTS) $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) torch numpy setuptools ninja pybind11
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) --no-build-isolation -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/python examples/digits.py

# The initialisation study, in the folder study/: an interrupted one continues. OPTIONS=--quick takes
# two minutes, the whole about 40 on two cores.
study: setup
	$(BIN)/python -m fastdeq study $(OPTIONS)

# Files are spread over two processes, each with one thread. The second run has the Triton kernels in
# Triton's interpreter, which must be chosen at the start.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile
test: setup
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels

# Compiles the kernels, Triton and CUDA C++, for sm_80 and sm_90, and looks at what they occupy.
test-kernels: setup
	$(PYTEST) -m compiled tests/compiled

# The same tests with another torch: make test-torch TORCH=2.11.0. From the source archive, in
# build/torch-$(TORCH), where they have an environment and an extension of their own.
test-torch: setup
	.ci/other_torch $(TORCH) without-cuda

# The same with the CUDA sources compiled, by the nvcc that is here, for a torch with CUDA.
cuda-build: setup
	.ci/other_torch $(TORCH) with-cuda

# From the first import on, also in the processes that tests start.
COVERAGE := $(BIN)/coverage run -m pytest -n 2 --dist loadfile
coverage: setup
	$(BIN)/coverage erase
	$(COVERAGE)
	TRITON_INTERPRET=1 $(COVERAGE) tests/kernels
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

bench: setup
	$(BIN)/python -m pytest bench/ --benchmark-only -q --results bench/results/cpu.json

# Tests and measures on a machine with an NVIDIA GPU and no network, with the torch that PYTHON has.
gpu:
	$(PYTHON) bench/gpu/gpu_run.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

docs: setup
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv .venv-gpu build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache fastdeq/_build.json
	rm -f fastdeq/_C*.so demo.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
