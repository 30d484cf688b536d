#!/usr/bin/env bash
# sanitize.sh asan|tsan LLAMA: builds the engine and the server, all but llama.cpp, under
# AddressSanitizer and UBSan, or ThreadSanitizer, into build/server-<which>.
set -euo pipefail
cd "$(dirname "$0")/../.."
case "${1:-}" in
  asan) sanitizers=address,undefined ;;
  tsan) sanitizers=thread ;;
  *) echo "usage: $0 asan|tsan LLAMA" >&2; exit 2 ;;
esac
build=build/server-$1 prefix=$PWD/build/server-$1/engine
torch=$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')
mkdir -p "$build"
echo "building the engine and the server with $sanitizers, some minutes ..."
{
  cmake -S . -B "$build/engine-build" -G Ninja -DPython_EXECUTABLE="$(command -v python)" \
    -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1 \
    -DSPARSE_TRANSCODER_CUDA=OFF -DSPARSE_TRANSCODER_SANITIZE=$sanitizers
  cmake --build "$build/engine-build"
  cmake --install "$build/engine-build" --prefix "$prefix"
  cmake -S examples/server -B "$build" -G Ninja -DCMAKE_PREFIX_PATH="$prefix;$torch" \
    -DFEATURE_SERVER_SANITIZE=$sanitizers -DFETCHCONTENT_SOURCE_DIR_LLAMA_CPP="$2"
  cmake --build "$build"
} >"$build.log" 2>&1 || { tail -n 50 "$build.log"; exit 1; }
