#!/usr/bin/env bash
# fuzz.sh [SECONDS]: the readers of weights under libFuzzer, AddressSanitizer and UBSan, from the corpus in fuzz_corpus/.
set -euo pipefail
cd "$(dirname "$0")/../.."
seconds=${1:-600}
compiler=${CLANGXX:-$(command -v clang++-19 || command -v clang++ || true)}
[ -n "$compiler" ] || { echo "clang++ is not here: install clang with its sanitizer runtime (Debian: clang-19 libclang-rt-19-dev)"; exit 1; }
build=build/fuzz
mkdir -p "$build/found"
echo "building the fuzzer with $compiler, some minutes ..."
cmake -S . -B "$build" -G Ninja -DPython_EXECUTABLE="$(command -v python)" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g" -DSPARSE_TRANSCODER_CPP_TESTS=ON -DSPARSE_TRANSCODER_CUDA=OFF \
  -DSPARSE_TRANSCODER_SANITIZE=fuzzer-no-link,address,undefined >"$build.log" 2>&1 || { cat "$build.log"; exit 1; }
cmake --build "$build" --target fuzz_weights >>"$build.log" 2>&1 || { cat "$build.log"; exit 1; }

# What is new goes to found/; a crash leaves its input in build/fuzz.
if [ -w /dev/shm ]; then export TMPDIR=/dev/shm; fi  # a file an input: not on a disk
export OMP_NUM_THREADS=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
"$build/tests/cpp/fuzz_weights" -max_total_time="$seconds" -max_len=4096 -timeout=10 -dict=tests/cpp/fuzz.dict \
  -artifact_prefix="$build/" -print_final_stats=1 "$build/found" tests/cpp/fuzz_corpus
echo "fuzz: nothing found in $seconds seconds"
