# Everything runs in a virtual environment of its own, .venv, with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint train-shapes

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@

demo: .venv/installed
	$(BIN)/unclip sample "a red apple, glossy 3D"

test: .venv/installed-test lint
	$(BIN)/python -m pytest

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

train-shapes: .venv/installed-test
	$(BIN)/python -m recipes.shapes.run
