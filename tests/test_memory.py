"""What a call may allocate: its outputs, and nothing that grows with the tokens or the features."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from oracle import SCREENINGS, make_layer, normal, on
from sparse_transcoder import SparseTranscoderEncoder, TranscoderWeights

TOP_K = 20


def build(layers, device="cpu", **options):
    return SparseTranscoderEncoder(
        {i: TranscoderWeights(**on(w, device)) for i, w in layers.items()}, TOP_K, **options
    )


def allocations(call, device):
    """Sizes in bytes of what torch's allocator hands out during the call; how many on CUDA."""
    if device.type == "cuda":
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        call()
        return [None] * (torch.cuda.memory_stats()["allocation.all.allocated"] - before)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    return sorted(
        event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0
    )


def outputs(tokens, layers=1):
    return sorted([4 * tokens * TOP_K, 8 * tokens * TOP_K, 4 * tokens] * layers)


@pytest.mark.parametrize(
    "tokens, dtype, kind, view",
    [
        (1, torch.float32, "relu", "whole"),
        (1, torch.bfloat16, "layer norm", "strided"),
        (64, torch.float16, "topk", "whole"),
        (1500, torch.float32, "relu", "whole"),
        (1500, torch.float32, "jumprelu", "strided"),
        (1500, torch.bfloat16, "layer norm", "whole"),
        (1500, torch.bfloat16, "topk", "strided"),
    ],
)
@pytest.mark.parametrize("screening", SCREENINGS)
def test_torch_allocates_the_outputs_alone(device, tokens, dtype, kind, view, screening):
    norm = {"ln_weight": torch.ones(64), "ln_bias": torch.zeros(64)} if kind == "layer norm" else {}
    layer = make_layer(3000, 64, kind="relu" if norm else kind, **norm)
    encoder = build({0: layer, 1: layer}, device, screening=screening)
    hidden = normal(tokens, 64).to(device, dtype)
    if view == "strided":
        hidden = torch.cat([hidden, hidden], 1)[:, ::2]
    calls = {
        1: [lambda: encoder.encode_layer(0, hidden), lambda: encoder.encode_chunked(0, hidden)],
        2: [lambda: encoder.encode_all_layers({0: hidden, 1: hidden})],
    }
    for count, variants in calls.items():
        for call in variants:
            call()
            call()
            got = allocations(call, device)
            assert len(got) == 3 * count, got
            if device.type == "cpu":
                assert got == outputs(tokens, count)


# Every thread and every allocator of the process: the C library's malloc, watched from outside.

WATCH = """
#include <cstddef>
extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
long watched[4096], watched_count, watched_from = -1;
static void* seen(void* block, size_t bytes) {
  const long from = __atomic_load_n(&watched_from, __ATOMIC_RELAXED);
  if (from < 0 || (long)bytes < from) return block;
  watched[__atomic_fetch_add(&watched_count, 1, __ATOMIC_RELAXED) % 4096] = (long)bytes;
  return block;
}
void* malloc(size_t n) { return seen(__libc_malloc(n), n); }
void* calloc(size_t m, size_t n) { return seen(__libc_calloc(m, n), m * n); }
void* realloc(void* p, size_t n) { return seen(__libc_realloc(p, n), n); }
void* memalign(size_t a, size_t n) { return seen(__libc_memalign(a, n), n); }
void* aligned_alloc(size_t a, size_t n) { return seen(__libc_memalign(a, n), n); }
int posix_memalign(void** p, size_t a, size_t n) {
  return (*p = seen(__libc_memalign(a, n), n)) ? 0 : 12;
}
}
"""

COUNT = """
import ctypes, json, sys
import torch
from oracle import make_layer, normal
from sparse_transcoder import SparseTranscoderEncoder, TranscoderWeights

watch = ctypes.CDLL(None)
sizes = (ctypes.c_long * 4096).in_dll(watch, "watched")
count = ctypes.c_long.in_dll(watch, "watched_count")
least = ctypes.c_long.in_dll(watch, "watched_from")

def watched(call):
    for _ in range(3):
        kept = call()
        del kept
    count.value, least.value = 0, 512
    kept = call()
    least.value = -1
    return sorted(sizes[: count.value])

layers = {i: TranscoderWeights(**make_layer(3000 + i, 64)) for i in range(3)}
encoder = SparseTranscoderEncoder(layers, 20, chunk_size=1024)
others = {
    name: SparseTranscoderEncoder(layers, 20, chunk_size=1024, screening=name)
    for name in ("int8", "int16")
}
hidden = normal(2500, 64)
print(json.dumps({
    "one": watched(lambda: encoder.encode_layer(0, hidden)),
    "int16": watched(lambda: others["int16"].encode_layer(0, hidden)),
    "int8": watched(lambda: others["int8"].encode_layer(0, hidden)),
    "bfloat16": watched(lambda: encoder.encode_layer(0, hidden.bfloat16())),
    "all": watched(lambda: encoder.encode_all_layers(dict.fromkeys(layers, hidden))),
    "short": watched(lambda: encoder.encode_all_layers(dict.fromkeys(layers, hidden[:3]))),
    "torch": watched(lambda: torch.empty(5000)),
}))
"""


def python(code, **environment):
    tests = os.path.dirname(os.path.abspath(__file__))
    environment = {**os.environ, "PYTHONPATH": tests, "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="watches the C library's malloc")
def test_the_process_allocates_the_outputs_alone(tmp_path):
    source, library = tmp_path / "watch.cpp", tmp_path / "watch.so"
    source.write_text(WATCH)
    subprocess.run(
        [os.environ.get("CXX", "g++"), "-shared", "-fPIC", "-O1", "-o", library, source], check=True
    )
    got = python(COUNT, LD_PRELOAD=str(library))
    assert got["torch"] == [20_000]  # the watch sees what it should
    assert got["one"] == got["int16"] == got["int8"] == outputs(2500)
    copy = 2500 * 64 * 2  # hidden.bfloat16() itself
    assert got["bfloat16"] == sorted([*outputs(2500), copy])
    assert got["all"] == outputs(2500, layers=3)
    assert got["short"] == []


# Planned once


@pytest.mark.parametrize("screening", SCREENINGS)
def test_workspace_is_planned_at_construction(device, screening):
    encoder = build({0: make_layer(3000, 64), 1: make_layer(100, 64)}, device, screening=screening)
    planned = encoder.workspace_bytes
    assert type(planned) is int and planned > 0
    for tokens in (64, 4096, 1):
        encoder.encode_layer(0, normal(tokens, 64).to(device))
        encoder.encode_all_layers(dict.fromkeys((0, 1), normal(tokens, 64).to(device)))
        encoder.encode_into(dict.fromkeys((0, 1), normal(tokens, 64).to(device)), lambda rows: None)
        assert encoder.workspace_bytes == planned


@pytest.mark.parametrize("screening", SCREENINGS)
def test_workspace_does_not_grow_with_features(device, screening):
    layers = [{0: make_layer(features, 8)} for features in (40_000, 120_000)]
    sizes = [build(layer, device, screening=screening).workspace_bytes for layer in layers]
    assert sizes[0] == sizes[1]


def test_workspace_grows_with_chunk_size(device):
    small, large = (
        build({0: make_layer(3000, 64)}, device, chunk_size=size).workspace_bytes
        for size in (64, 2048)
    )
    assert small < large


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_reports_what_is_held(device, dtype):
    layer = make_layer(3000, 64, dtype=dtype)
    held = sum(layer[name].nbytes for name in ("W_enc", "b_enc"))
    for screening in SCREENINGS:
        encoder = build({0: layer}, device, screening=screening)
        memory = encoder.memory()
        assert all(type(value) is int and value >= 0 for value in memory.values())
        assert memory["workspace_bytes"] == encoder.workspace_bytes
        assert memory["weight_bytes"] >= held
        if screening == "off":
            assert memory["screening_bytes"] == 0


def test_weights_are_shared_with_the_caller(device):
    """No copy: the tensors that went in are the ones that are held."""
    layer = on(make_layer(3000, 64), device)
    weights = TranscoderWeights(**layer)
    assert weights.W_enc.data_ptr() == layer["W_enc"].data_ptr()
    assert weights.b_enc.data_ptr() == layer["b_enc"].data_ptr()


PEAK = """
import json, sys
import torch
from oracle import make_layer, normal
from sparse_transcoder import SparseTranscoderEncoder, TranscoderWeights

def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

tokens, features, top_k = 32768, 32768, 20
weights = TranscoderWeights(torch.randn(features, 64).div_(8), torch.full((features,), -1.0))
hidden = torch.randn(tokens, 64)
# touches the code, and keeps its own buffers, so that none of them is used again below
small = SparseTranscoderEncoder({0: TranscoderWeights(**make_layer(3000, 64))}, top_k)
small.encode_layer(0, hidden[:1200])
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")
before = kib("VmRSS")
encoder = SparseTranscoderEncoder({0: weights}, top_k)
before += encoder.memory()["screening_bytes"] // 1024
result = encoder.encode_layer(0, hidden)
grown = kib("VmHWM") - before
outputs = sum(result[name].nbytes for name in ("activations", "indices", "sparsity"))
active = result["sparsity"].mean().item()
print(json.dumps({"grown": grown * 1024, "outputs": outputs, "active": active}))
"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel keeps no resettable peak"
)
def test_peak_of_a_long_encode():
    got = python(PEAK)
    assert 0.02 < got["active"] < 0.03  # the features were really looked at
    assert got["grown"] >= got["outputs"] / 2  # ... and the peak really measured
    assert got["grown"] - got["outputs"] < 64 << 20
