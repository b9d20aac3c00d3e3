# make demo: install, draw scenes, train, evaluate, label, report.   make test: install with the test extra, run every test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(BIN)/pixelwise demo --out runs/demo

test: $(VENV)/.tested
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/.tested
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

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

clean:
	rm -rf $(VENV) runs build
