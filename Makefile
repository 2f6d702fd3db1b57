# Two commands that need no set-up:  make demo   make test
# Each makes its own virtual environment, with the versions of constraints.txt.

PYTHON ?= python3
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := $(shell find src -type f -name '*.py' -o -type f -name '*.html')

.PHONY: demo test test-fast test-timm lint format bench reference clean

demo: .venv-demo/installed  ## forecast the weight decay of a network on real data, and write the page
	.venv-demo/bin/decaycast find --data digits --train-size 512 --optimizer adamw --budget 1500 --verify

test: .venv-test/installed  ## the whole suite
	.venv-test/bin/python -m pytest -q

test-fast: .venv-test/installed  ## without the tests marked slow
	.venv-test/bin/python -m pytest -q -m "not slow"

test-timm: .venv-timm/installed  ## the tests against timm, which needs torchvision and with it torch as the registry has it (5 GB)
	.venv-timm/bin/python -m pytest -q -m timm $(shell grep -rl --include='*.py' 'mark\.timm' tests)

bench: .venv-bench/installed  ## every benchmark, hours; the table alone: python bench/all.py --table
	.venv-bench/bin/python bench/all.py

reference: .venv-test/extras  ## the API reference, from the docstrings: build/reference/decaycast.html
	.venv-test/bin/python docs/reference.py

lint: .venv-test/linters  ## style and types
	.venv-test/bin/ruff check src tests bench docs/reference.py
	.venv-test/bin/ruff format --check src tests bench docs/reference.py
	.venv-test/bin/pyright

format: .venv-test/linters
	.venv-test/bin/ruff check --fix src tests bench docs/reference.py
	.venv-test/bin/ruff format src tests bench docs/reference.py

clean:
	rm -rf .venv-demo .venv-test .venv-timm .venv-bench dist

# one pip command with the constraint sees torch's pinned version first, so that a CPU build of it is taken where there is one

.venv-demo/installed: pyproject.toml constraints.txt $(SOURCES)
	test -x .venv-demo/bin/python || $(PYTHON) -m venv .venv-demo
	.venv-demo/bin/python $(PIP_INSTALL) '.[lab]'
	touch $@

.venv-test/installed: pyproject.toml constraints.txt
	test -x .venv-test/bin/python || $(PYTHON) -m venv .venv-test
	.venv-test/bin/python $(PIP_INSTALL) --editable '.[test]'
	touch $@

# without constraints: torchvision has no build beside the pinned CPU torch
.venv-timm/installed: pyproject.toml
	test -x .venv-timm/bin/python || $(PYTHON) -m venv .venv-timm
	.venv-timm/bin/python -m pip install --quiet --disable-pip-version-check --editable . 'timm>=1.0.20' 'pytest>=8.4' 'hypothesis>=6.140'
	touch $@

.venv-bench/installed: pyproject.toml constraints.txt
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python $(PIP_INSTALL) --editable '.[bench,ray,parquet]'
	touch $@

.venv-test/extras: .venv-test/installed
	.venv-test/bin/python $(PIP_INSTALL) --editable '.[test,docs,ray,parquet,lightning,hf,optuna,torchmetrics,loggers]'
	touch $@

.venv-test/linters: .venv-test/installed
	.venv-test/bin/python $(PIP_INSTALL) --editable '.[dev]'
	touch $@
