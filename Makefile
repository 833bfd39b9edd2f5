# make demo: the whole loop on the shipped model, report in runs/demo/report.html
# make test: the tests that take seconds each;  make test-slow: the end-to-end ones; both in two processes of one thread each
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.installed
DEVELOP := $(VENV)/.installed-dev

.PHONY: demo test test-slow lint
demo: $(READY)
	$(VENV)/bin/remoe run configs/run/demo.yaml

test: $(DEVELOP)
	$(VENV)/bin/python -m pytest -n 2 -m "not slow"

test-slow: $(DEVELOP)
	$(VENV)/bin/python -m pytest -n 2 -m slow

lint: $(DEVELOP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# torch comes first: pip would otherwise let another package choose its version. Compiling everything takes longer than
# installing it, so that is left to the first import; tests compile all, because there a warning while compiling is an error.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := $(VENV)/bin/python -m pip install --quiet --no-compile
$(READY): pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) "pip>=24"
	$(PIP_INSTALL) "$$(sed -n 's/.*"\(torch==[0-9.]*\)".*/\1/p' pyproject.toml)"
	$(PIP_INSTALL) -e .
	touch $(READY)

$(DEVELOP): $(READY)
	$(PIP_INSTALL) -e ".[dev]"
	$(VENV)/bin/python -m compileall -qq -j 0 $(VENV)/lib || true # some packages hold files that are no Python 3
	touch $(DEVELOP)
