# `make demo` and `make test` make the virtual environment themselves; everything else uses the same one.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: demo test test-slow test-cpus check format bench exhaustive clean

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/altgrad demo

test: $(READY)
	$(BIN)/python -m pytest -n 2

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# The numeric tests under three classes of CPU, emulated, and with each route of the matrix products forced.
test-cpus: $(READY)
	$(BIN)/python -m benchmarks.cpu_classes --write

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2

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
	$(BIN)/python -m benchmarks.bench_beside
	$(BIN)/python -m benchmarks.bench_first_use
	$(BIN)/python -m benchmarks.bench_monitor
	$(BIN)/python -m benchmarks.bench_optim
	$(BIN)/python -m benchmarks.bench_replay
	$(BIN)/python -m benchmarks.long_run study
	$(BIN)/python -m benchmarks.cuda_instructions
	$(BIN)/python -m benchmarks.cuda_traffic
	$(BIN)/python -m benchmarks.bench_cuda

exhaustive: $(READY)
	$(BIN)/python -m benchmarks.exhaustive

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
