# Everything stands on `make install`: a virtual environment in .venv, torch first, from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help install test lint types layers unit docs-check docs demo tiny-model bench-convert bench-engine bench-gpu-rehearsal clean

help: ## Show the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Create .venv and install trtkit with everything CI needs

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade "pip>=23"
	@echo "installing torch from constraints.txt"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	@echo "installing trtkit[dev]"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(STAMP)

test: install lint types layers unit docs-check ## Everything CI runs

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

layers: install
	$(BIN)/lint-imports

unit: install
	$(BIN)/python -m pytest -n auto --dist loadfile

docs-check: install
	$(BIN)/python docs/build.py --check

docs: install ## Regenerate the generated pages
	$(BIN)/python docs/build.py

demo: install ## The main job end to end on the embedded engine, in minutes, on a CPU
	$(BIN)/trtkit demo

tiny-model: install ## Retrain the shipped tiny model
	$(BIN)/python bench/tiny_model/train.py

bench-convert: install ## Converter speed and memory against cp
	$(BIN)/python bench/convert_vs_cp.py

bench-engine: install ## Embedded engine against transformers, side by side
	$(BIN)/python bench/engine_vs_transformers.py

bench-gpu-rehearsal: install ## What runs on a GPU box, on this CPU with tiny shapes and without rates
	rm -rf results/gpu-rehearsal
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 bash bench/gpu/one_call.sh results/gpu-rehearsal --limit-s 300 --rehearse

clean: ## Remove what builds and runs leave (not .venv)
	rm -rf builds/*.engine builds/*.engine.partial results .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
