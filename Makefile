# Everything runs in one virtual environment, which the targets make and fill: `make demo` with what a demo needs,
# `make docs` with what the site needs, the others with all of it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
RUNS := $(VENV)/.runs
SITE := $(VENV)/.site
READY := $(VENV)/.installed
LOWEST := $(VENV)-lowest

.PHONY: demo test test-slow test-lowest test-wheel test-cpus check docs format bench exhaustive clean

$(RUNS): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e .
	touch $(RUNS)

$(SITE): $(RUNS)
	$(PIP) -c constraints.txt -e ".[docs]"
	touch $(SITE)

$(READY): $(RUNS)
	$(PIP) -c constraints.txt -e ".[dev]"
	touch $(READY)

demo: $(RUNS)
	$(BIN)/altgrad demo

test: $(READY)
	$(BIN)/python -m pytest -n 2

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# The tests on the lowest versions that pyproject.toml allows, in an environment of their own. Warnings are no errors there: old
# packages use what new ones deprecate.
test-lowest:
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m tests.lowest > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(LOWEST)/lowest.txt -e ".[dev]"
	$(LOWEST)/bin/python -m pytest -n 2 -W default

# The wheel, in an environment and an empty folder of its own: the commands of the README, as written.
test-wheel: $(READY)
	$(BIN)/python -m pytest -m slow tests/test_wheel.py

# The numeric tests under three classes of CPU, emulated, and with each route of the matrix products forced.
test-cpus: $(READY)
	$(BIN)/python -m benchmarks.cpu_classes --write

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2

# build/site: tutorials, guides, findings and the reference of the public API; a dead link is an error.
docs: $(SITE)
	$(BIN)/mkdocs build --strict

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The numbers of docs/benchmarks.md; each file also runs by itself, such as `.venv/bin/python -m benchmarks.bench_step`.
bench: $(READY)
	$(BIN)/python -m benchmarks.bench_quantize
	$(BIN)/python -m benchmarks.bench_calls
	$(BIN)/python -m benchmarks.bench_blocks
	$(BIN)/python -m benchmarks.bench_step
	$(BIN)/python -m benchmarks.bench_step --without-units --models 10M,0.8M
	$(BIN)/python -m benchmarks.bench_step --like avx2 --models 10M,0.8M
	$(BIN)/python -m benchmarks.bench_step --convolutions
	$(BIN)/python -m benchmarks.bench_beside
	$(BIN)/python -m benchmarks.bench_first_use
	$(BIN)/python -m benchmarks.bench_monitor
	$(BIN)/python -m benchmarks.bench_optim
	$(BIN)/python -m benchmarks.bench_micro_batches
	$(BIN)/python -m benchmarks.bench_load
	$(BIN)/python -m benchmarks.bench_replay
	$(BIN)/python -m benchmarks.long_run study
	$(BIN)/python -m benchmarks.cuda_instructions
	$(BIN)/python -m benchmarks.cuda_traffic
	$(BIN)/python -m benchmarks.cuda_fusion
	$(BIN)/python -m benchmarks.cuda_waits
	$(BIN)/python -m benchmarks.bench_cuda

exhaustive: $(READY)
	$(BIN)/python -m benchmarks.exhaustive

clean:
	rm -rf $(VENV) $(LOWEST) build .pytest_cache .ruff_cache .hypothesis
