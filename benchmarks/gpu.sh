#!/usr/bin/env bash
# Builds the project on a machine with an NVIDIA GPU, then tests, sanitizes and measures it there, within 8 minutes.
#
#   benchmarks/gpu.sh [OUT_DIR [WHEEL_DIR]]      (OUT_DIR: out/gpu unless given; gets gpu.json and gpu.log)
#
# Needs nvcc and a python3 with a CUDA torch, cmake, ninja, pybind11, scikit-build-core and pytest; no network, and installs
# nothing there. What else python3 lacks (nlohmann-json, hypothesis, pyyaml, ...) is taken from the wheels in WHEEL_DIR. With
# pytest-xdist the tests run in WORKERS processes, except those that measure the device and need it alone.
#   PYTHON, CUDAARCHS, CUDA_HOME, SPARSE_TRANSCODER_JSON_INCLUDE              override what is found
#   LIMIT=470                                                                 seconds for everything
#   WORKERS=8                                                                 processes that test at once
#   REST=30                                                                   seconds for tests that need no GPU
# Exit status 1 when a stage failed; the table at the end names it.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${PYTHON:-python3}") || { echo "${PYTHON:-python3} is not here"; exit 1; }
mkdir -p "${1:-$root/out/gpu}" || exit 1
out=$(cd "${1:-$root/out/gpu}" && pwd)
wheels=${2:+$(cd "$2" && pwd)} || exit 1
log=$out/gpu.log
work=$root/build/gpu  # kept: another run builds only what changed
site=$work/site
trap 'exit 130' INT TERM
cd "$root" || exit 1
deadline=$((SECONDS + ${LIMIT:-470}))
table=() failed=0
mkdir -p "$site"
: >"$log"
rm -f "$out/gpu.json" "$work/built"

say() { echo "$*" | tee -a "$log"; }

note() {  # NAME RESULT SECONDS REMARK
  table+=("$(printf '%-18s %-12s %4s s  %s' "$1" "$2" "$3" "$4")")
  [[ $2 == FAILED ]] && failed=1
  say "--- ${table[-1]}"
}

left() { echo $((deadline - SECONDS)); }

least() { echo $(($1 < $2 ? $1 : $2)); }

# stage NAME LIMIT COMMAND...: runs the command for at most so many seconds; its output goes to the log, its end to the screen.
# With optional=1 it may run out of time as long as nothing failed until then.
optional=0
stage() {
  local name=$1 limit begun=$SECONDS status part=$work/part
  limit=$(least "$2" "$(left)")
  shift 2
  say "=== $name, at most $limit s"
  if ((limit < 5)); then
    if ((optional)); then note "$name" "NO TIME" 0 "not run"; else note "$name" FAILED 0 "not run: no time left"; fi
    return
  fi
  timeout -s INT -k 10 "$limit" "$@" >"$part" 2>&1 </dev/null
  status=$?
  report "$name" "$limit" "$begun" "$status" "$part"
}

# report NAME LIMIT BEGUN STATUS OUTPUT_FILE: what came of a command.
report() {
  local name=$1 limit=$2 begun=$3 status=$4 part=$5 remark
  cat "$part" >>"$log"
  tail -n 40 "$part"
  remark=$(grep -v '^[[:space:]]*$' "$part" | tail -n 1 | cut -c 1-160)
  if ((status == 0)); then
    note "$name" passed $((SECONDS - begun)) "$remark"
  elif ((status == 124 || status == 137)); then
    if ((optional)) && ! grep -qE '^(FAILED|ERROR) |[0-9]+ (failed|error)' "$part"; then
      note "$name" "OUT OF TIME" $((SECONDS - begun)) "$remark"
    else
      note "$name" FAILED $((SECONDS - begun)) "stopped after $limit s; $remark"
    fi
  else
    note "$name" FAILED $((SECONDS - begun)) "exit status $status; $remark"
  fi
}

# built NAME LIMIT COMMAND...: a stage that needs the build.
built() {
  if [[ -f $work/built ]]; then stage "$@"; else note "$1" FAILED 0 "not run: the build failed"; fi
}

# The machine

ask() { timeout 60 "$python" -c "$1" 2>/dev/null; }

toolkit=
compiler=$(readlink -f "$(command -v nvcc)")
for folder in "${CUDA_HOME:-}" "${compiler%/bin/nvcc}" /usr/local/cuda /usr/local/cuda-*; do
  [[ -x $folder/bin/nvcc && -f $folder/include/cuda_runtime.h ]] && toolkit=$folder && break
done
torch_folder=$(ask 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent)')
arch=${CUDAARCHS:-$(ask 'import torch; print("%d%d" % torch.cuda.get_device_capability())' || echo 90)}
export CUDA_HOME=$toolkit CUDAARCHS=$arch PATH=${toolkit:+$toolkit/bin:}${python%/*}:$PATH
export PYTHONPATH=$site PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# The library and its CMake package find torch beside themselves; here it is elsewhere.
export LD_LIBRARY_PATH=$torch_folder/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export CMAKE_PREFIX_PATH=$torch_folder/share/cmake${CMAKE_PREFIX_PATH:+:$CMAKE_PREFIX_PATH}
export python wheels site work toolkit torch_folder

# shellcheck disable=SC2329  # called through bash -c below
build() {
  set -e
  [[ -n $torch_folder ]] || { echo "torch is not here"; exit 1; }
  "$python" -c 'import sys, torch; sys.exit(not torch.version.cuda)' || { echo "this torch was built without CUDA"; exit 1; }
  [[ -x $toolkit/bin/nvcc ]] || { echo "nvcc is not here: set CUDA_HOME"; exit 1; }
  pip=("$python" -m pip install -q --no-index --no-deps --no-cache-dir --disable-pip-version-check --upgrade --target "$site")
  [[ -z $wheels ]] || "${pip[@]}" "$wheels"/*.whl
  defines=(-Ccmake.define.SPARSE_TRANSCODER_CUDA=ON)
  if [[ -n ${SPARSE_TRANSCODER_JSON_INCLUDE:-} ]]; then
    defines+=(-Ccmake.define.SPARSE_TRANSCODER_JSON_INCLUDE="$SPARSE_TRANSCODER_JSON_INCLUDE")
  fi
  "${pip[@]}" --no-build-isolation -Cbuild-dir="$work/build" "${defines[@]}" .
  "$python" - <<'PY'
import pathlib, sys

import sparse_transcoder, torch

library = pathlib.Path(sparse_transcoder.cmake_prefix_path) / "lib" / "libsparse_transcoder.so"
if b".nv_fatbin" not in library.read_bytes():
    sys.exit(f"{library} holds no CUDA code")
print(f"built for torch {torch.__version__}: {library.stat().st_size >> 10} KiB")
PY
  touch "$work/built"
}
export -f build

stage card 60 "$python" -c '
import sys, torch

if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no CUDA device")
name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
print(f"{name}, compute capability {major}.{minor}, torch {torch.__version__}, CUDA {torch.version.cuda}")'
stage build 200 bash -c build

# The tests: what needs the device first, then the rest as far as time goes

left_out=()
for module in hypothesis yaml numpy safetensors pybind11_stubgen; do
  ask "import $module" && continue
  mapfile -t -O "${#left_out[@]}" left_out < <(grep -lE "^(import|from) $module\b" tests/test_*.py)
done
files=(tests/test_cuda.py)
slow=(tests/test_cuda_kernels.py tests/test_cpp.py)  # they compile, and need no device
for pass in 1 2; do
  for file in tests/test_*.py; do
    [[ $pass == 1 && " ${slow[*]} " == *" $file "* ]] && continue
    [[ " ${files[*]} ${left_out[*]} " == *" $file "* ]] || files+=("$file")
  done
done
export ST_REQUIRE_CUDA=1
test_run=("$python" -m pytest -p no:cacheprovider -rf)
parallel_run=()
if ask 'import xdist'; then
  parallel_run=(env OMP_NUM_THREADS=2 "${test_run[@]}" -n "${WORKERS:-8}" --dist worksteal)
fi

# The sanitizers begin: they are slow, and run beside the tests. Ours are the kernels of the namespace sparse_transcoder.

declare -A sanitizing
sanitizer=$(PATH=$PATH:$toolkit/compute-sanitizer command -v compute-sanitizer)
for tool in memcheck racecheck; do
  if [[ -z $sanitizer || ! -f $work/built ]]; then
    note "$tool" FAILED 0 "compute-sanitizer or the build is not here"
    continue
  fi
  # memcheck sees where an allocation ends only when torch does not cut many from one.
  caching=(env)
  [[ $tool == memcheck ]] && caching=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1)
  limit=$(least 180 $(($(left) - 60)))
  {
    timeout -s INT -k 10 "$limit" "${caching[@]}" "$sanitizer" --tool "$tool" --error-exitcode 99 --report-api-errors no \
      --kernel-name kernel_substring=sparse_transcoder "${test_run[@]}" tests/test_cuda.py -k sanitizer \
      >"$work/$tool" 2>&1 </dev/null
    echo $? >"$work/$tool.status"
  } &
  echo $! >"$work/$tool.pid"
  sanitizing[$tool]="$limit $SECONDS"
done

if ((${#parallel_run[@]})); then
  built "GPU tests" "$(least 120 $(($(left) - 150)))" "${parallel_run[@]}" --maxfail=60 --durations=10 -m "gpu and not alone" "${files[@]}"
  built "GPU tests, alone" "$(least 60 $(($(left) - 120)))" "${test_run[@]}" --durations=5 -m "gpu and alone" "${files[@]}"
else
  parallel_run=("${test_run[@]}")
  built "GPU tests" "$(least 200 $(($(left) - 150)))" "${test_run[@]}" --maxfail=60 --durations=10 -m gpu "${files[@]}"
fi
rest=$(least "${REST:-30}" $(($(left) - 90)))
optional=1
built "other tests" "$rest" "${parallel_run[@]}" --maxfail=20 -m "not gpu" "${files[@]}"
optional=0

# The sanitizers end.

for tool in "${!sanitizing[@]}"; do
  read -r limit begun <<<"${sanitizing[$tool]}"
  while kill -0 "$(cat "$work/$tool.pid")" 2>/dev/null; do sleep 1; done
  say "=== $tool, at most $limit s"
  report "$tool" "$limit" "$begun" "$(cat "$work/$tool.status")" "$work/$tool"
done

seconds=$(least 240 $(($(left) - 12)))
# shellcheck disable=SC2086  # the options are several words
built benchmark $((seconds + 10)) "$python" benchmarks/gpu.py --out "$out/gpu.json" --seconds "$seconds" ${BENCH:-}

say ""
say "Stages, $SECONDS s in all; the log is $log"
for line in "${table[@]}"; do say "$line"; done
((${#left_out[@]} == 0)) || say "left out, as python3 lacks what they import: ${left_out[*]}"
exit "$failed"
