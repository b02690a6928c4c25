# `make demo`, `make check` and `make test` need only Python 3.10+ and make: each makes its own .venv and installs what
# it needs.
PYTHON ?= python3
VENV := .venv
# two processes; the tests of a file stay in one, as they share what is built for them
PYTEST := $(VENV)/bin/python -m pytest -n 2 --dist loadfile

.PHONY: demo check test lint bench coverage tal docs clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(VENV)/bin/python -m examples.digits.demo

# while working: under three minutes on two cores
check: $(VENV)/.installed lint
	$(PYTEST) -m "not slow"

# everything, as CI runs it
test: $(VENV)/.installed lint
	$(PYTEST)

lint: $(VENV)/.installed
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy

bench: $(VENV)/.installed
	$(VENV)/bin/python -m benchmarks.memory

# every architecture of timm, torchvision and transformers; about an hour, and goes on where it was stopped
coverage: $(VENV)/.installed
	$(VENV)/bin/python -m benchmarks.coverage

# the flagship on a synthetic set: makes it, fine-tunes the rewired backbone, trains end to end and draws
# runs/synthetic/report.html; minutes on two cores. A run that was stopped goes on. One thread: the decoder has the other core
tal: export OMP_NUM_THREADS ?= 1
tal: $(VENV)/.installed
	$(VENV)/bin/python -m examples.re2tal.synth data/synthetic
	$(VENV)/bin/python -m examples.re2tal.pretrain synthetic
	$(VENV)/bin/python -m examples.re2tal.train synthetic backbone.weights=runs/synthetic/pretrain/backbone.safetensors

# the site, into build/site
docs: $(VENV)/.installed
	$(VENV)/bin/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) build dist *.egg-info
