# make run    the whole InstructGPT pipeline on the embedded world, with a report
# make smoke  the same, tiny, in under two minutes
# make test   lint, types and the test suite (make lint, make types: one of them)
# make reliability  power cuts, kills, full disks, signals, damage, on the real programs: an hour at most, best as root
# Each target sets up what it needs. ACCELERATOR=cpu|cuda|tpu overrides what set-up finds.

CONFIG  ?= configs/instructgpt/storyland.py
WORKDIR ?= runs/instructgpt
WORKERS ?= 2

FIND_PYTHON = for p in python3.13 python3.12 python3.11 python3 python; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && exit; done
ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell $(FIND_PYTHON))
endif

# Colab has no use for a virtual environment: its own Python has the right jax.
ifdef COLAB_RELEASE_TAG
PY := $(PYTHON)
else
PY := .venv/bin/python
endif

# An environment that was set up for a GPU runs on the CPU all the same when told to.
ifeq ($(ACCELERATOR),cpu)
export JAX_PLATFORMS := cpu
endif

# Large pages for what a CPU step allocates: steps take about a tenth less time. Two arenas: with one a thread about 100 MB
# more of what the compiler freed stay. glibc reads this once, at the start.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.arena_max=2

.DEFAULT_GOAL := help
.PHONY: help python setup setup-dev run smoke test lint types format tests reliability clean

help:
	@sed -n '1,/^$$/s/^# //p' Makefile

python:
ifeq ($(strip $(PYTHON)),)
	@echo "Python 3.11 or newer is needed; none of python3.13, python3.12, python3.11, python3 is one." >&2
	@echo "Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2
	@exit 1
endif

setup: python
	@$(PYTHON) tools/setup_env.py

setup-dev: python
	@$(PYTHON) tools/setup_env.py --extras=dev

run: setup
	@$(PY) experiments/instructgpt.py --config=$(CONFIG) --workdir=$(WORKDIR) $(ARGS)

smoke: setup
	@$(PY) experiments/instructgpt.py --config=$(CONFIG):smoke --workdir=runs/smoke --overwrite $(ARGS)

test: lint types tests

lint: setup-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: setup-dev
	$(PY) -m pyright

tests: setup-dev
	$(PY) -m pytest --quiet --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder --durations=15 $(ARGS)

reliability: setup-dev
	$(PY) -m tests.reliability.everything $(ARGS)

format: setup-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
