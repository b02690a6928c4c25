# `make demo` and `make test` need only Python 3.10+ and make: each makes its own .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv

.PHONY: demo test lint bench coverage docs clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(VENV)/bin/python -m examples.digits.demo

test: $(VENV)/.installed lint
	$(VENV)/bin/python -m pytest

lint: $(VENV)/.installed
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy

bench: $(VENV)/.installed
	$(VENV)/bin/python -m benchmarks.memory

# every architecture of timm, torchvision and transformers; about an hour, and goes on where it was stopped
coverage: $(VENV)/.installed
	$(VENV)/bin/python -m benchmarks.coverage

# the site, into build/site
docs: $(VENV)/.installed
	$(VENV)/bin/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) build dist *.egg-info
