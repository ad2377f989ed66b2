# Every target creates .venv and installs what it needs, once.
#
#   make demo                       hear the voice, and fine-tune it on generated notes
#   make test ARGS="-k mulaw"       pass ARGS to the program that the target runs
#   make test PYTHON=python3.12     create .venv with this interpreter (the first time)

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow wheel-test notebooks docs soak fuzz test-cuda bench-cuda bench-training lint format clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'

demo: $(VENV)/.installed  ## speak a sentence, fine-tune the voice on generated notes, compare before and after
	$(BIN)/wavear demo $(ARGS)

# One thread per worker: more of them would wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist load

test: $(VENV)/.installed-dev  ## run the tests and the docstring examples, without the slow ones
	$(BIN)/python tests/warm.py
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(VENV)/.installed-dev  ## run the slow tests, which make test leaves out
	$(BIN)/python tests/warm.py
	$(PYTEST) -m slow --timeout 3600 $(ARGS)

wheel-test: $(VENV)/.installed-dev  ## build the wheel, install it into an empty environment, synthesize
	$(BIN)/python tests/wheel.py $(ARGS)

soak: $(VENV)/.installed  ## kill training and synthesis 100 times and compare (ARGS="--kills 20 --synthesis-kills 10")
	$(BIN)/python bench/kills.py --kills 67 --synthesis-kills 33 $(ARGS)

MINUTES ?= 60
fuzz: $(VENV)/.installed-dev  ## read changed files of all kinds for an hour (MINUTES=30); keep faults in tests/fuzz/found
	cd tests && ../$(BIN)/python -m fuzz --minutes $(MINUTES) $(ARGS)

bench-training: $(VENV)/.installed  ## measure training speed, and write it to docs/benchmarks.md (ARGS="--device cuda")
	$(BIN)/python bench/training.py $(ARGS)
	$(BIN)/python bench/forms.py $(filter --device cpu cuda,$(ARGS))

test-cuda: $(VENV)/.installed-dev  ## run the tests of the CUDA engines, including those that need a card
	$(BIN)/python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no CUDA device here")'
	$(BIN)/python -m pytest tests/test_triton.py tests/test_cuda_graph.py $(ARGS)
	$(BIN)/python -m pytest -m cuda $(ARGS)

bench-cuda: $(VENV)/.installed  ## measure the CUDA engines, and write docs/benchmarks_cuda.md
	$(BIN)/python bench/generation.py --device cuda $(ARGS)

notebooks: $(VENV)/.installed-dev  ## run docs/notebooks and store their outputs (ARGS=hear: one of them)
	$(BIN)/python bench/notebooks.py $(ARGS)

docs: $(VENV)/.installed-docs  ## build the docs site into build/docs; warnings are errors
	$(BIN)/python -m sphinx -E -a --fail-on-warning --keep-going -c docs -d build/doctrees . build/docs $(ARGS)

lint: $(VENV)/.installed-dev  ## check style, format, types and English
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m pyright
	$(BIN)/python -m pytest -q tests/test_english.py

format: $(VENV)/.installed-dev  ## reformat the code, and fix what ruff can fix
	$(BIN)/python -m ruff check --fix --exit-zero
	$(BIN)/python -m ruff format

clean:  ## remove caches and builds; keep .venv and runs
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find wavear tests recipes bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# One pip command per stamp: pip must resolve torch and torchaudio together.
$(VENV)/.installed: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install -e .
	touch $@

$(VENV)/.installed-docs: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install -e ".[docs]"
	touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install -e ".[dev]"
	touch $@ $(VENV)/.installed $(VENV)/.installed-docs

# Editable installs from pyproject.toml need pip 21.3; Python 3.10 may come with an older one.
# The target is pip, not python: without ensurepip, venv creates a python and fails before pip.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "wavear needs Python 3.10 or newer, $(PYTHON) is " + sys.version.split()[0] + "; try make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "pip>=21.3"
