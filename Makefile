PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test test-gpu lint docs dist release-check bench clean

demo: $(STAMP)            ## train on a small model and open its report, in a few minutes
	$(BIN)/ether demo .demo

test: $(STAMP)            ## all tests
	$(BIN)/python -m pytest -n 2

test-gpu: $(STAMP)        ## the tests that need a CUDA device; all others run on the CPU
	ETHER_TEST_GPU=1 $(BIN)/python -m pytest -m gpu

lint: $(STAMP)            ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)            ## the documentation as a site in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dist: $(STAMP)            ## wheel and source archive in dist/, checked
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

release-check: dist       ## install the wheel into an empty environment elsewhere, and use it as a newcomer would
	$(BIN)/python tests/release.py dist/*.whl

bench: $(STAMP)           ## time, memory and launches of training steps, and inference, with short settings
	$(BIN)/python benchmarks/step.py --model playground --rounds 20
	$(BIN)/python benchmarks/step.py --resolution 256 --rounds 3 --methods "ETHER n=4" "ETHER+ n=4" "LoRA r=4" "dense ETHER+ n=4"
	$(BIN)/python benchmarks/launches.py --methods "ETHER n=4" "ETHER+ n=4" "LoRA r=4" "dense ETHER+ n=4"
	$(BIN)/python benchmarks/inference.py --resolution 256 --rounds 3 --resident 50

$(STAMP): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

clean:                    ## remove the environment and what was made
	rm -rf .venv .demo dist site
