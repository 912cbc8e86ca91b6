PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test test-gpu lint bench clean

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

clean:                    ## remove the environment and what the demo made
	rm -rf .venv .demo
