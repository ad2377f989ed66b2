# Every target makes .venv and installs into it what it needs; the second time it starts at once.
#
#   make demo                       train a small WaveNet on sounds made here, and hear it
#   make test ARGS="-k mulaw"       ARGS goes to the program the target runs
#   make test PYTHON=python3.12     the interpreter that .venv is made with (the first time)

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-cuda bench-cuda bench-training lint format clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'

demo: $(VENV)/.installed  ## make sounds, train a small WaveNet on them, synthesize held-out notes
	$(BIN)/wavear demo $(ARGS)

test: $(VENV)/.installed-dev  ## run the tests and the examples in the docstrings
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

bench-training: $(VENV)/.installed  ## how fast it trains here, into docs/benchmarks.md (ARGS="--device cuda")
	$(BIN)/python bench/training.py $(ARGS)
	$(BIN)/python bench/forms.py $(filter --device cpu cuda,$(ARGS))

test-cuda: $(VENV)/.installed-dev  ## run the tests of the CUDA engines, those that need a card among them
	$(BIN)/python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no CUDA device here")'
	$(BIN)/python -m pytest tests/test_triton.py tests/test_cuda_graph.py $(ARGS)
	$(BIN)/python -m pytest -m cuda $(ARGS)

bench-cuda: $(VENV)/.installed  ## measure the CUDA engines, and write docs/benchmarks_cuda.md
	$(BIN)/python bench/generation.py --device cuda $(ARGS)

lint: $(VENV)/.installed-dev  ## check style, format and types
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m pyright

format: $(VENV)/.installed-dev  ## rewrite the code in the project's format, and fix what ruff can fix
	$(BIN)/python -m ruff check --fix --exit-zero
	$(BIN)/python -m ruff format

clean:  ## remove caches and builds; .venv and what a demo or a training run wrote stay
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find wavear tests recipes bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# One pip command per stamp: torch and torchaudio have to be resolved together.
$(VENV)/.installed: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install -e ".[dev]"
	touch $@ $(VENV)/.installed

# Editable installs from pyproject.toml need pip 21.3; Python 3.10 may come with an older one.
# The target is pip, not python: where the system lacks ensurepip, venv stops with a python and without a pip.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "wavear needs Python 3.10 or newer, $(PYTHON) is " + sys.version.split()[0] + "; try make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "pip>=21.3"
