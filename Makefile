# The two commands: `make demo` grounds the shipped clip, `make test` runs the tests. Each makes .venv and installs into
# it; nothing is installed outside of it. Override on the command line: make test PYTHON=python3.12 CONSTRAINTS= ARGS="-k spans"

PYTHON ?= python3
VENV ?= .venv
# Tested versions; CONSTRAINTS= takes whatever setup.cfg allows.
CONSTRAINTS ?= constraints.txt
# More options for pip (another index, a folder of wheels) and for the command that runs.
PIP_ARGS ?=
ARGS ?=

# The harness, what our own versions of the libraries are there, and the last filelock whose inner names it finds.
LMMS_VENV ?= build/lmms-venv
LMMS ?= lmms-eval==0.7.3 'torch>=2.13' 'transformers>=5.23,<5.24' 'datasets>=5.2,<6' 'filelock<4' 'pytest>=9.2' 'pytest-timeout>=2.4'

# What a user may have installed and nothing here needs. torchvision wants a torch built for CUDA, which runs on a CPU, too.
OPTIONAL_VENV ?= build/optional-venv
OPTIONAL ?= torchvision bitsandbytes torchao optimum-quanto

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test test-lmms test-optional lint clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/'

demo: $(STAMP) ## Ground the shipped clip with the shipped checkpoint and draw demo_timeline.png
	$(BIN)/python -m d2vlm_hf.cli ground --demo --figure demo_timeline.png $(ARGS)

test: $(STAMP) ## Run the tests
	$(BIN)/python -m pytest $(ARGS)

test-lmms: ## Run the plug-in for lmms-eval beside it, in an environment of its own (its pins conflict with ours)
	test -x $(LMMS_VENV)/bin/python || $(PYTHON) -m venv $(LMMS_VENV)
	$(LMMS_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) $(LMMS)
	$(LMMS_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) --no-deps --editable .
	$(LMMS_VENV)/bin/python -m pytest tests/test_lmms_plugin.py $(ARGS)

test-optional: ## Run what needs quantization libraries and torchvision, in an environment of its own
	test -x $(OPTIONAL_VENV)/bin/python || $(PYTHON) -m venv $(OPTIONAL_VENV)
	$(OPTIONAL_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) $(OPTIONAL) --editable '.[dev]'
	$(OPTIONAL_VENV)/bin/python -m pytest tests/test_hub_loading.py tests/test_video_processing.py $(ARGS)

lint: $(STAMP) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean: ## Remove the environment and everything that tools have written
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis demo_timeline.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): setup.cfg pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[dev]'
	touch $@
