#!/usr/bin/env bash
# arm.sh: cross-compiles the kernels and their tests for aarch64 and runs them under qemu, once as a processor with
# every extension and once as one without the dot product. It needs no torch. What it takes says nothing of Arm's speed.
set -euo pipefail
cd "$(dirname "$0")/../.."
cxx=${CROSS_CXX:-aarch64-linux-gnu-g++}
qemu=${QEMU:-$(command -v qemu-aarch64-static || echo qemu-aarch64)}
for tool in "$cxx" "$qemu"; do
  command -v "$tool" >/dev/null || {
    echo "$tool is not here: install it (Debian: g++-aarch64-linux-gnu, qemu-user-static), or set CROSS_CXX and QEMU" >&2
    exit 1
  }
done
build=build/arm
mkdir -p "$build"
# The flags of CMakeLists.txt.
flags=(-std=c++20 -O3 -DNDEBUG -Wall -Wextra -Werror -ffp-contract=off -Icsrc -Itests/cpp)
objects=()
for source in csrc/cpu/kernels/{dispatch,portable,neon,neondot}.cpp tests/cpp/{main,kernels,screening}.cpp; do
  object=$build/$(basename "$(dirname "$source")")-$(basename "$source" .cpp).o
  march=()
  [ "$source" != csrc/cpu/kernels/neondot.cpp ] || march=(-march=armv8.2-a+dotprod)
  "$cxx" "${flags[@]}" "${march[@]}" -c "$source" -o "$object"
  objects+=("$object")
done
"$cxx" -static "${objects[@]}" -o "$build/kernel_tests"

# run CPU SET: every test as this processor, with this set as the best.
run() {
  echo "$1: $2"
  SPARSE_TRANSCODER_CPU=$2 SPARSE_TRANSCODER_TEST_ONE_IN=16 "$qemu" -cpu "$1" "$build/kernel_tests"
}
run max neondot
run cortex-a53 neon
status=0
SPARSE_TRANSCODER_CPU=neondot "$qemu" -cpu cortex-a53 "$build/kernel_tests" kernels_are_chosen || status=$?
[ $status = 77 ] || { echo "a processor without the dot product does not refuse neondot" >&2; exit 1; }
echo "make test-arm: every test passed"
