# The two commands of the README; each sets up all it needs on a fresh machine.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test lint types setup clean

demo: .venv/installed
	$(BIN)/remanence learn builtin:mixed --out runs/demo

test: lint types
	$(BIN)/python -m pytest

lint: .venv/developing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/developing
	$(BIN)/mypy

setup: .venv/developing

# torch goes first and alone, so that no other package's requirement can choose another build of it
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

# what only tests need, some of it large
.venv/developing: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv runs build
