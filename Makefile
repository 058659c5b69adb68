# Each target makes its own virtual environment first; a second run finds it ready.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test lint clean
.DEFAULT_GOAL = demo

demo: .venv/demo
	$(BIN)/bridges demo

test: .venv/dev
	$(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile

lint: .venv/dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/basedpyright

.venv/%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[$*]"
	touch $@

clean:
	rm -rf .venv
