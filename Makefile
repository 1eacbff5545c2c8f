# Two commands for newcomers: `make demo` and `make test`. Both set up all that they need in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

export PROMPT ?= a large red circle on a blue background
export OUT ?= picture.png

.DEFAULT_GOAL := help

.PHONY: help
help:  ## Say what there is to make
	@echo "make TARGET [VARIABLE=value ...]"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 18

.PHONY: demo
demo: $(INSTALLED)  ## Make a picture by a real tritonserver [PROMPT="..."] [OUT=picture.png]
	@$(BIN)/python demo.py "$$PROMPT" "$$OUT"

.PHONY: test
test: $(INSTALLED)  ## Run all tests, those through a real tritonserver too
	@$(MAKE) --no-print-directory --jobs=2 --keep-going --output-sync=target test-export test-others

# Two processes side by side: what exports takes one core, and what serves, the other.
.PHONY: test-export test-others
test-export: $(INSTALLED)
	$(BIN)/python -m pytest tests/export

test-others: $(INSTALLED)
	$(BIN)/python -m pytest --ignore=tests/export

.PHONY: test-fast
test-fast: $(INSTALLED)  ## Run the tests that need neither PyTorch nor a server: seconds
	$(BIN)/python -m pytest -m "not torch and not server"

.PHONY: lint
lint: $(INSTALLED)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: format
format: $(INSTALLED)  ## Repair what can be repaired of style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: serve
serve: build/shapes/manifest.json  ## Serve the embedded checkpoint on ports 8000 to 8002
	$(BIN)/darkroom serve build/shapes

.PHONY: perf
perf: build/shapes/manifest.json  ## Run perf_analyzer against it, over gRPC and HTTP
	$(BIN)/python benchmarks/perf.py build/shapes

.PHONY: bench
bench: build/shapes/manifest.json  ## Measure what continuous batching gives
	$(BIN)/python benchmarks/batching.py build/shapes

.PHONY: bench-decode
bench-decode: build/shapes/manifest.json  ## Measure what decoding costs the steps beside it
	$(BIN)/python benchmarks/decode.py build/shapes

.PHONY: bench-overload
bench-overload: build/shapes/manifest.json  ## Ask for three times what the server can
	$(BIN)/python benchmarks/overload.py build/shapes

.PHONY: bench-fairness
bench-fairness: build/shapes/manifest.json  ## Measure who waits for whom when all rows are taken
	$(BIN)/python benchmarks/fairness.py build/shapes

.PHONY: bench-memory
bench-memory: build/shapes/manifest.json  ## Measure what each memory profile saves and costs
	$(BIN)/python benchmarks/memory.py build/shapes

.PHONY: bench-hop
bench-hop: build/shapes/manifest.json  ## Measure a step's way to the networks, in process or by Triton
	$(BIN)/darkroom export shapes/checkpoint build/shapes-torch --backend torch
	$(BIN)/python benchmarks/hop.py build/shapes-torch --onnx build/shapes

.PHONY: bench-gpu
bench-gpu: $(INSTALLED)  ## Measure the GPU path beside diffusers, on a machine with a GPU
	PYTHON=$(abspath $(BIN)/python) benchmarks/gpu.sh

.PHONY: equivalence
equivalence: $(INSTALLED)  ## Compare every family and mode with diffusers, and write the table
	$(BIN)/python -m equivalence --output docs/equivalence.md

.PHONY: soak
soak: build/shapes/manifest.json  ## Send thousands of requests, and watch answers and memory
	$(BIN)/python benchmarks/soak.py build/shapes

.PHONY: clean
clean:  ## Remove everything that was made, the virtual environment too
	rm -rf $(VENV) build dist .tools

build/shapes/manifest.json: $(INSTALLED)
	$(BIN)/darkroom export shapes/checkpoint build/shapes

# The constraints make the set-up reproducible; what the project needs is in pyproject.toml.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; make PYTHON=python3.11 names one")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@
