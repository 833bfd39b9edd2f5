# make demo: the whole loop on the shipped model, report in runs/demo/report.html
# make test: the tests that take seconds each;  make test-slow: the end-to-end ones
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.installed

.PHONY: demo test test-slow lint
demo: $(READY)
	$(VENV)/bin/remoe run configs/run/demo.yaml

test: $(READY)
	$(VENV)/bin/python -m pytest -m "not slow"

test-slow: $(READY)
	$(VENV)/bin/python -m pytest -m slow

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# torch comes first: pip would otherwise let another package choose its version.
$(READY): pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade "pip>=24"
	$(VENV)/bin/python -m pip install --quiet "$$(sed -n 's/.*"\(torch==[0-9.]*\)".*/\1/p' pyproject.toml)"
	$(VENV)/bin/python -m pip install --quiet -e ".[dev]"
	touch $(READY)
