# Everything runs in a virtual environment of its own, .venv, with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test types train-shapes

demo: .venv/installed
	$(BIN)/unclip sample "a red apple, glossy 3D"

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

# Beside what `test` checks: types. Pyright fetches its own program from the npm registry at its first run.
types: .venv/installed-test
	$(BIN)/pyright

train-shapes: .venv/installed
	$(BIN)/python -m recipes.shapes.run

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@
