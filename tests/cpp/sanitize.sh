#!/usr/bin/env bash
# sanitize.sh asan|tsan: builds the C++ tests under AddressSanitizer and UBSan, or ThreadSanitizer, and runs them.
set -euo pipefail
cd "$(dirname "$0")/../.."
case "${1:-}" in
  asan) sanitizers=address,undefined ;;
  tsan) sanitizers=thread ;;
  *) echo "usage: $0 asan|tsan" >&2; exit 2 ;;
esac
build=build/$1
mkdir -p build
echo "building the C++ tests with $sanitizers, some minutes ..."
cmake -S . -B "$build" -G Ninja -DPython_EXECUTABLE="$(command -v python)" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1 -DSPARSE_TRANSCODER_CPP_TESTS=ON -DSPARSE_TRANSCODER_CUDA=OFF \
  -DSPARSE_TRANSCODER_SANITIZE=$sanitizers \
  >"$build.log" 2>&1 || { cat "$build.log"; exit 1; }
cmake --build "$build" >>"$build.log" 2>&1 || { cat "$build.log"; exit 1; }

# torch is not instrumented: its threads would look like races, so its own work gets one. The tests choose theirs, see main.cpp.
export OMP_NUM_THREADS=1
export ASAN_OPTIONS=detect_stack_use_after_return=1:strict_string_checks=1
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1
"$build/tests/cpp/cpp_tests"
for cpu in portable avx2 neon; do  # what the best of this machine hides
  SPARSE_TRANSCODER_CPU=$cpu "$build/tests/cpp/cpp_tests" engine_ || [ $? = 77 ]  # 77: the machine cannot run it
done
if [ -x "$build/tests/cpp/cpp_tests_emulated_amx" ]; then  # which sees what tiles read and write
  SPARSE_TRANSCODER_CPU=avx512amx "$build/tests/cpp/cpp_tests_emulated_amx" engine_ screening_int8_sums || [ $? = 77 ]
fi
echo "$1: clean"
