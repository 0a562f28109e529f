# The verbs of this project. `make run` and `make test` set up what they need; CI uses them too.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run test build lint bench evidence clean

run: .venv/.ready            ## execute every solved notebook on tiny into executed/
	$(BIN)/python -m tools.run

test: .venv/.ready           ## run every test, the notebooks included
	$(BIN)/python -m pytest -n 2 --dist loadgroup

build: .venv/.ready          ## build notebooks/ from lessons/
	$(BIN)/python -m tools.build

lint: .venv/.ready           ## style, and whether notebooks and lessons agree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tools.build --check

bench: .venv/.ready          ## tools.run against bare nbclient; training against TRL's defaults; loading against from_pretrained
	$(BIN)/python -m tools.bench
	$(BIN)/python -m tools.bench_training
	$(BIN)/python -m tools.bench_loading

evidence: .venv/.ready       ## compute the lessons' stored many-seed results again (two hours on two cores)
	for script in lessons/week*/evidence/*.py; do $(BIN)/python $$script || exit 1; done

clean:                       ## remove what was executed; .venv stays
	rm -rf executed runs .pytest_cache .ruff_cache

# torch goes first: with it there, pip keeps that build and does not look for another.
.venv/.ready: requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet -r requirements.txt -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@
