# `make quickstart` and `make test` are all a newcomer needs; each makes the environment in .venv first.
PYTHON ?= python3
BIN = .venv/bin
OUT = quickstart-output

.PHONY: setup quickstart test test-slow lint clean

setup: .venv/ready

.venv/ready: requirements.txt requirements_dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements_dev.txt
	touch $@

test: setup lint
	$(BIN)/python -m pytest

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(OUT)
