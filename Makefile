# make demo: install, draw scenes, train, evaluate, label, report.   make test: install with the test extra, run every test.
# make bench: race peers, in an environment of their own (7 GB).   make bench-check: compare with the recorded ratios.
# make bench-accuracy: accuracy for equal minutes (7 hours; goes on where it was).   All three want a machine that does nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH := .venv-bench

.PHONY: demo test lint bench bench-check bench-accuracy clean

demo: $(VENV)/.installed
	$(BIN)/pixelwise demo --out runs/demo

test: $(VENV)/.tested
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/.tested
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(BENCH)/.installed
	$(BENCH)/bin/python benchmarks/bench.py

bench-check: $(BENCH)/.installed
	$(BENCH)/bin/python benchmarks/bench.py --check

bench-accuracy: $(BENCH)/.installed
	$(BENCH)/bin/python benchmarks/accuracy.py

# The packages come first and on their own, so that a change of the source installs in seconds.
$(VENV)/.dependencies: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt .
	touch $@

$(VENV)/.installed: $(VENV)/.dependencies $(shell find src -type f -not -name '*.pyc')
	$(BIN)/python -m pip install --quiet --no-deps --force-reinstall -c constraints.txt .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt ".[test]"
	touch $@

$(BENCH)/.dependencies: constraints.txt pyproject.toml benchmarks/requirements.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet -c constraints.txt -r benchmarks/requirements.txt .
	touch $@

$(BENCH)/.installed: $(BENCH)/.dependencies $(shell find src -type f -not -name '*.pyc')
	$(BENCH)/bin/python -m pip install --quiet --no-deps --force-reinstall -c constraints.txt .
	touch $@

clean:
	rm -rf $(VENV) $(BENCH) runs build
