"""What only a CUDA device can show.

Streams, graphs, the allocator, torch's switches, streamed weights, and the CPU's bits. Tests named
test_sanitizer_* are small enough for compute-sanitizer; benchmarks/gpu.sh runs them under it.
"""

import contextlib
import ctypes
import gc
import itertools
import math
import random
import re
import shutil
import subprocess
import threading
import warnings
from pathlib import Path

import pytest
import torch
from oracle import FLOATS, SCREENINGS, check, make_layer, normal, on, same_bits
from sparse_transcoder import SparseTranscoderEncoder, TranscoderWeights

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
TOP_K, TAU = 20, 0.5
NAP = (
    250_000_000  # clock cycles, more than 0.1 s: far longer than it takes to enqueue any call here
)
MIB = 1 << 20
RESULTS = ("activations", "indices", "sparsity")


def build(layers, device=DEVICE, top_k=TOP_K, tau=TAU, **options):
    weights = {i: TranscoderWeights(**on(layer, device), layer=i) for i, layer in layers.items()}
    return SparseTranscoderEncoder(weights, top_k, tau, **options)


def alike(count, features=1200, size=200, dtype=torch.bfloat16):
    return {i: make_layer(features, size, seed=10 * i, dtype=dtype) for i in range(count)}


def mixed():
    """Layers that share neither kind, dtype nor size."""
    norm = {"ln_weight": 1 + 0.3 * normal(96, seed=7), "ln_bias": 0.3 * normal(96, seed=8)}
    return {
        0: make_layer(1500, 200),
        1: make_layer(701, 123, seed=10, kind="jumprelu", dtype=torch.bfloat16),
        4: make_layer(257, 72, seed=20, kind="topk", dtype=torch.float16),
        5: make_layer(1000, 96, seed=30, dtype=torch.bfloat16, **norm),
    }


def rows_of(layers, tokens, seed=0, dtype=torch.float32, device=DEVICE):
    """{layer: hidden}, other numbers with each seed."""
    rows = {
        i: normal(tokens, layer["W_enc"].shape[1], seed=1000 + 31 * seed + i)
        for i, layer in layers.items()
    }
    return {i: x.to(device, dtype) for i, x in rows.items()}


def encode(encoder, hidden):
    if len(hidden) > 1:
        return encoder.encode_all_layers(hidden)
    return {i: encoder.encode_layer(i, x) for i, x in hidden.items()}


def check_all(got, hidden, layers, top_k=TOP_K, tau=TAU, unit=True):
    assert got.keys() == hidden.keys()
    for i, x in hidden.items():
        check(got[i], x, layers[i], top_k, tau, unit)


def on_cpu(got):
    return {i: {name: result[name].cpu() for name in RESULTS} for i, result in got.items()}


def in_threads(count, work):
    """work(number) in so many threads at once, each on a stream of its own.

    The first failure is raised here.
    """
    ready, failures = threading.Barrier(count), []

    def run(number):
        try:
            with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
                ready.wait()
                work(number)
        except BaseException as error:
            failures.append(error)
            ready.abort()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.fixture(autouse=True)
def nothing_pending():
    """What a test leaves running or cached must not reach the next."""
    yield
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


# Small enough for compute-sanitizer


@pytest.mark.parametrize(
    "tokens, screening",
    [(1, "auto"), (5, "auto"), (16, "auto"), (40, "auto"), (5, "int8"), (16, "int8"), (40, "int8")],
)
@pytest.mark.parametrize("use_compile", [True, False])
def test_sanitizer_many_layers(tokens, screening, use_compile):
    layers = {
        0: make_layer(300, 40),
        1: make_layer(131, 33, seed=10, kind="jumprelu", dtype=torch.bfloat16),
        2: make_layer(77, 24, seed=20, kind="topk", dtype=torch.float16),
    }
    encoder = build(layers, use_compile=use_compile, screening=screening)
    for seed in range(3):  # the third is a replay
        hidden = rows_of(layers, tokens, seed)
        check_all(encode(encoder, hidden), hidden, layers)


@pytest.mark.parametrize("screening", ["auto", "off", "int8"])
def test_sanitizer_hard_rows(screening):
    layer = make_layer(201, 35)
    layer["W_enc"][100:] = layer["W_enc"][:101].clone()
    hidden = normal(11, 35)
    hidden[1, 3], hidden[2, 0], hidden[4], hidden[5] = math.nan, math.inf, 0.0, hidden[6]
    hidden[7] *= 1e30
    hidden = hidden.to(DEVICE)
    for top_k, tokens in itertools.product((7, 201), (1, 8, 11)):
        got = encode(
            build({0: layer}, top_k=top_k, tau=0.0, screening=screening), {0: hidden[:tokens]}
        )
        check_all(got, {0: hidden[:tokens]}, {0: layer}, top_k, 0.0, unit=False)


def test_sanitizer_streamed_weights():
    layers = alike(3, 150, 40)
    encoder = build(layers, "cpu", device_weight_bytes=0)
    for tokens in (2, 20):
        hidden = rows_of(layers, tokens)
        check_all(encode(encoder, hidden), hidden, layers)


# The host never waits


@contextlib.contextmanager
def synchronising_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.alone
@pytest.mark.parametrize("use_compile", [True, False])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("count", [1, 12])
@pytest.mark.parametrize("tokens", [1, 8, 64, 700])
def test_encode_returns_while_the_device_is_busy(tokens, count, streamed, use_compile):
    layers = alike(count)
    place = {"device": "cpu", "device_weight_bytes": 0} if streamed else {"device": DEVICE}
    encoder = build(layers, use_compile=use_compile, **place)
    for seed in range(3):
        encode(encoder, rows_of(layers, tokens, seed))
    hidden = rows_of(layers, tokens, seed=9)
    before = torch.cuda.Event()
    torch.cuda.synchronize()
    with synchronising_is_an_error():
        torch.cuda._sleep(NAP)
        before.record()
        got = encode(encoder, hidden)
        waited = before.query()
    assert not waited, "encode returned only after the device had done the work before it"
    check_all(got, hidden, layers)


# Streams


@pytest.mark.alone
@pytest.mark.parametrize("use_compile", [True, False])
@pytest.mark.parametrize("tokens", [1, 64, 700])
@pytest.mark.parametrize("streamed", [False, True])
def test_work_is_ordered_by_the_callers_stream(tokens, use_compile, streamed):
    """Hidden states that come late on a stream, results read on it, for streams that take turns."""
    layers = mixed()
    place = {"device": "cpu", "device_weight_bytes": 0} if streamed else {"device": DEVICE}
    encoder = build(layers, use_compile=use_compile, **place)
    first, second = torch.cuda.Stream(DEVICE), torch.cuda.Stream(DEVICE)
    for turn, stream in enumerate(
        [first, first, first, second, torch.cuda.default_stream(DEVICE), second]
    ):
        late = rows_of(layers, tokens, seed=turn)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            hidden = {i: torch.zeros_like(x) for i, x in late.items()}
            torch.cuda._sleep(NAP // 8)
            for i, x in late.items():
                hidden[i].copy_(x)
            got = encode(encoder, hidden)
            read = {
                i: {name: result[name].clone() for name in RESULTS} for i, result in got.items()
            }
            for i in hidden:  # what comes after the call on its stream must not reach it
                hidden[i].fill_(math.nan)
                for name in RESULTS:
                    got[i][name].zero_()
        stream.synchronize()
        check_all(read, late, layers)
        assert not any(got[i][name].any() for i in got for name in RESULTS), (
            "written after the call's place in its stream"
        )


@pytest.mark.alone
@pytest.mark.parametrize("use_compile", [True, False])
@pytest.mark.parametrize("tokens", [1, 64, 700])
def test_hidden_and_results_may_be_freed_at_once(tokens, use_compile):
    """Their memory goes to the next that asks, while the call that uses it has not begun."""
    layers = mixed()
    encoder = build(layers, use_compile=use_compile)
    source = rows_of(layers, tokens)
    kept, others = [], []
    with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream(DEVICE))
        for _ in range(5):
            hidden = {
                i: torch.stack([x, x], -1)[..., 0] for i, x in source.items()
            }  # strided: may need a copy
            torch.cuda._sleep(NAP // 16)
            kept.append(encode(encoder, hidden))
            del hidden
            others += [torch.full((*x.shape, 2), math.nan, device=DEVICE) for x in source.values()]
            encode(encoder, source)  # dropped at once
            others += [
                torch.full((tokens, TOP_K), math.nan, device=DEVICE, dtype=torch.float64)
                for _ in layers
            ]
            others += [torch.full((tokens, TOP_K), math.nan, device=DEVICE) for _ in layers]
        torch.cuda.current_stream().synchronize()
    for got in kept:
        check_all(got, source, layers)
    assert all(other.isnan().all() for other in others), "memory that was freed is written"


# The allocator


def asked(call):
    """Bytes asked of torch's allocator during a call, its peak above the start, and its result."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()
    result = call()
    after = torch.cuda.memory_stats()
    total = after["requested_bytes.all.allocated"] - before["requested_bytes.all.allocated"]
    return total, after["requested_bytes.all.peak"] - before["requested_bytes.all.current"], result


@pytest.mark.alone
@pytest.mark.parametrize("use_compile", [True, False])
@pytest.mark.parametrize("count, streamed", [(1, False), (4, False), (4, True)])
def test_a_call_allocates_its_results_alone(count, streamed, use_compile):
    layers = alike(count)
    place = {"device": "cpu", "device_weight_bytes": 0} if streamed else {"device": DEVICE}
    encoder = build(layers, use_compile=use_compile, **place)
    for tokens in (1, 8, 64, 512, 8192):
        hidden = rows_of(layers, tokens)
        for _ in range(3):
            encode(encoder, hidden)
        workspace = encoder.workspace_bytes
        results = count * tokens * (4 * TOP_K + 8 * TOP_K + 4)
        total, peak, got = asked(lambda hidden=hidden: encode(encoder, hidden))
        assert (total, peak) == (results, results), f"{tokens} rows"
        assert sum(got[i][name].nbytes for i in got for name in RESULTS) == results
        assert encoder.workspace_bytes == workspace


def test_inference_mode_leaves_buffers_that_others_can_use():
    layers = alike(3)
    with torch.inference_mode():
        encoders = [build(layers), build(layers, "cpu", device_weight_bytes=0)]
        for encoder in encoders:
            encode(encoder, rows_of(layers, 20))
    for encoder in encoders:
        hidden = rows_of(layers, 20, seed=1)
        check_all(encode(encoder, hidden), hidden, layers)


# torch's switches

MATMUL = torch.backends.cuda.matmul
SWITCHES = [
    *itertools.product(
        (
            "allow_tf32",
            "allow_bf16_reduced_precision_reduction",
            "allow_fp16_reduced_precision_reduction",
            "allow_fp16_accumulation",
        ),
        (True, False),
    ),
    *(("float32_matmul_precision", value) for value in ("highest", "high", "medium")),
    ("deterministic_algorithms", True),
]


@contextlib.contextmanager
def switched(name, value):
    if name == "float32_matmul_precision":
        before = torch.get_float32_matmul_precision()
        change = torch.set_float32_matmul_precision
    elif name == "deterministic_algorithms":
        before = torch.are_deterministic_algorithms_enabled()

        def change(value):
            torch.use_deterministic_algorithms(value, warn_only=True)
    else:
        if not hasattr(MATMUL, name):
            pytest.skip(f"this torch has no {name}")
        before = getattr(MATMUL, name)

        def change(value):
            setattr(MATMUL, name, value)

    change(value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        change(before)


@pytest.fixture(scope="module")
def switch_case():
    """Encoders, rows with scores near their gates, and the results under torch's own settings."""
    made = []
    for dtype, screening in itertools.product(FLOATS, ("auto", "off")):
        layers = {
            0: make_layer(4100, 520, dtype=dtype),
            1: make_layer(999, 520, seed=10, dtype=dtype),
        }
        for layer in layers.values():
            layer["W_enc"] /= 20
            layer["b_enc"] = (TAU + layer["b_enc"] / 200).to(dtype)
        encoder = build(layers, screening=screening)
        for tokens in (1, 8, 64, 600):
            hidden = rows_of(layers, tokens)
            want = encode(encoder, hidden)
            check_all(want, hidden, layers)
            made.append((layers, screening, encoder, hidden, on_cpu(want)))
    return made


@pytest.mark.parametrize("name, value", SWITCHES)
def test_torch_switches_change_no_bit(switch_case, name, value):
    with switched(name, value):
        for layers, screening, encoder, hidden, want in switch_case:
            for _ in range(3):
                assert same_bits(on_cpu(encode(encoder, hidden)), want)
            assert same_bits(on_cpu(encode(build(layers, screening=screening), hidden)), want)


# Graphs

VIEWS = {
    "whole": lambda x: x.clone(),
    "every other": lambda x: torch.stack([x, x], -1)[..., 0],
    "transposed": lambda x: x.t().contiguous().t(),
    "shifted": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "batched": lambda x: x.clone()[None],
}


def encoders_of(layers, **options):
    return build(layers, **options), build(layers, use_compile=False, **options)


@pytest.mark.parametrize("screening", ["auto", "int8"])
def test_replays_give_the_bits_of_plain_calls(screening):
    """The same shapes again and again, in changing order, with other numbers at other addresses."""
    layers = mixed()
    replaying, plain = encoders_of(layers, screening=screening)
    shapes = list(
        itertools.product(
            (1, 3, 8, 9, 33, 64), FLOATS, VIEWS, ((0,), (1, 4), (5, 1, 0), tuple(layers))
        )
    )
    draw = random.Random(0)
    shapes = draw.sample(shapes, 36)
    held = []
    for turn in range(5):
        draw.shuffle(shapes)
        for number, (tokens, dtype, view, some) in enumerate(shapes):
            rows = rows_of({i: layers[i] for i in some}, tokens, 100 * turn + number, dtype)
            hidden = {i: VIEWS[view](x) for i, x in rows.items()}
            held.append((hidden, encode(replaying, hidden), encode(plain, hidden)))
    for number, (hidden, got, want) in enumerate(
        held
    ):  # results of earlier calls are the caller's own
        assert same_bits(got, want), f"call {number}"
        check_all(got, hidden, layers)


@pytest.mark.alone
@pytest.mark.parametrize("tokens, screening", [(2, "auto"), (40, "auto"), (64, "int8")])
@pytest.mark.parametrize("use_compile", [True, False])
def test_a_replay_is_one_launch(use_compile, tokens, screening):
    layers = alike(6)
    encoder = build(layers, use_compile=use_compile, screening=screening)
    hidden = rows_of(layers, tokens)
    for _ in range(3):
        encode(encoder, hidden)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        encode(encoder, hidden)
        torch.cuda.synchronize()
    calls = {
        event.key: event.count for event in profile.key_averages() if event.key.startswith("cuda")
    }
    if not calls:
        pytest.skip("the profiler sees no CUDA calls here")
    kernels = sum(count for name, count in calls.items() if name.startswith("cudaLaunchKernel"))
    if use_compile:
        assert (calls.get("cudaGraphLaunch"), kernels) == (1, 1), (
            calls
        )  # the addresses are written by a kernel of their own
    else:
        assert "cudaGraphLaunch" not in calls and kernels > 6 * 5, calls


def test_more_shapes_than_are_kept():
    layers = mixed()
    replaying, plain = encoders_of(layers)
    subsets = [some for count in range(1, 5) for some in itertools.combinations(layers, count)]
    shapes = list(itertools.product(range(1, 9), FLOATS[:2], subsets))
    for turn in range(2):
        for number, (tokens, dtype, some) in enumerate(shapes):
            chosen = {i: layers[i] for i in some}
            for repeat in range(2):
                encode(replaying, rows_of(chosen, tokens, repeat, dtype))
            hidden = rows_of(chosen, tokens, 10 + turn + number, dtype)
            assert same_bits(encode(replaying, hidden), encode(plain, hidden)), (
                turn,
                tokens,
                dtype,
                some,
            )


@pytest.mark.parametrize("streamed", [False, True])
def test_threads_share_an_encoder(streamed):
    """Each on its stream: one captures shapes while others encode and take device memory."""
    layers = mixed()
    place = {"device": "cpu", "device_weight_bytes": 0} if streamed else {"device": DEVICE}
    encoder, plain = build(layers, **place), build(layers, use_compile=False)
    subsets = [tuple(layers), (0,), (1, 4)]
    wanted = {}
    for tokens, some, seed in itertools.product((1, 2, 8, 40), subsets, range(3)):
        hidden = rows_of({i: layers[i] for i in some}, tokens, seed)
        want = encode(plain, hidden)
        check_all(want, hidden, layers)
        wanted[tokens, some, seed] = {i: x.cpu() for i, x in hidden.items()}, on_cpu(want)
    torch.cuda.synchronize()

    def work(number):
        cases = list(wanted.values())
        random.Random(number).shuffle(cases)
        taken = []
        for rows, want in cases:
            taken.append(torch.empty(4 * MIB, dtype=torch.uint8, device=DEVICE))
            hidden = {i: x.to(DEVICE) for i, x in rows.items()}
            assert same_bits(on_cpu(encode(encoder, hidden)), want)

    in_threads(6, work)


def test_a_callers_own_capture_is_refused():
    layers = alike(2)
    encoder = build(layers)
    hidden = rows_of(layers, 4)
    for count in (1, 2):
        some = {i: hidden[i] for i in range(count)}
        want = [encode(encoder, some) for _ in range(3)][-1]
        graph = torch.cuda.CUDAGraph()
        counter = torch.zeros(1, device=DEVICE)
        with torch.cuda.graph(graph):
            counter += 1
            with pytest.raises((RuntimeError, ValueError), match="captur") as caught:
                encode(encoder, some)
        text = str(caught.value)
        assert "\n" not in text and not re.search(
            r"Exception raised|c10::|at::|CUDA error", text
        ), text
        graph.replay()  # the caller's capture is whole ...
        torch.cuda.synchronize()
        assert counter.item() == 1
        assert same_bits(encode(encoder, some), want)  # ... and so is the encoder


# The same as on the CPU


@pytest.mark.parametrize("weight_dtype", FLOATS)
@pytest.mark.parametrize("hidden_dtype", FLOATS)
@pytest.mark.parametrize("screening", SCREENINGS)
def test_cpu_and_gpu_give_the_same_bits(weight_dtype, hidden_dtype, screening):
    layers = {
        0: make_layer(3001, 200, dtype=weight_dtype),
        1: make_layer(701, 123, seed=10, kind="jumprelu", dtype=weight_dtype),
        2: make_layer(257, 72, seed=20, kind="topk", dtype=weight_dtype),
        3: make_layer(
            515, 65, seed=30, dtype=weight_dtype, input_bias=normal(65, seed=9).to(weight_dtype)
        ),
    }
    layers[0]["W_enc"][1::7] = layers[0]["W_enc"][0].clone()  # ties
    gpu, cpu = build(layers, screening=screening), build(layers, "cpu")
    for tokens in (1, 2, 3, 5, 8, 16, 40, 64, 600):
        hidden = rows_of(layers, tokens, dtype=hidden_dtype)
        want = encode(cpu, {i: x.cpu() for i, x in hidden.items()})
        check_all(want, {i: x.cpu() for i, x in hidden.items()}, layers)
        assert same_bits(on_cpu(encode(gpu, hidden)), on_cpu(want)), f"{tokens} rows"


@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_gives_the_bits_of_other_screens_on_large_layers(dtype):
    """Planted rows, whose features the screen finds, and Gaussian ones that leave it many to
    compute."""
    layer = make_layer(20_003, 2304, dtype=dtype)
    layer["b_enc"] = torch.full((20_003,), -2.5).to(dtype)
    encoders = [build({0: layer}, screening=screening) for screening in ("auto", "int16", "off")]
    held = [encoder.memory()["screening_bytes"] for encoder in encoders]
    assert held[0] == held[1] + 20_003 * (2304 + 8), "auto makes an int8 copy of large layers"
    draw = torch.Generator().manual_seed(3)
    for tokens, scale in itertools.product((*range(1, 9), 9, 16, 17, 33, 64), (1, 1e4)):
        chosen = torch.randint(20_003, (tokens, 30), generator=draw)
        planted = 4 * layer["W_enc"].float()[chosen].sum(1)
        for hidden in (planted, normal(tokens, 2304, seed=tokens)):
            rows = {0: (hidden * scale).to(DEVICE)}
            want = on_cpu(encode(encoders[2], rows))
            assert want[0]["activations"].count_nonzero() > 0
            for encoder in encoders[:2]:
                for _ in range(3):  # the third is a replay
                    assert same_bits(on_cpu(encode(encoder, rows)), want), f"{tokens} rows"


@pytest.mark.parametrize("hidden_dtype", FLOATS)
@pytest.mark.parametrize("tokens", [1, 40, 600])
def test_layer_norm(hidden_dtype, tokens):
    layers = {i: layer for i, layer in mixed().items() if "ln_weight" in layer}
    hidden = rows_of(layers, tokens, dtype=hidden_dtype)
    check_all(encode(build(layers), hidden), hidden, layers)


# Weights that stay with the host

LAYER_BYTES = 4096 * 1024 * 2  # W_enc of the layers below


def settled_bytes():
    """Device memory that tensors hold, without what torch keeps for cuBLAS on each stream."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


@pytest.fixture(scope="module")
def large():
    return alike(6, 4096, 1024)


@pytest.fixture(scope="module")
def large_case(large):
    """Rows, their results with all weights on the device, and that encoder's memory."""
    encoder = build(large, use_compile=False)
    some = [
        (tokens, layers) for tokens in (1, 8, 64, 700) for layers in (tuple(large), (5,), (4, 0, 2))
    ]
    cases = [rows_of({i: large[i] for i in layers}, tokens, tokens) for tokens, layers in some]
    wanted = [encode(encoder, hidden) for hidden in cases]
    for hidden, want in zip(cases, wanted, strict=True):
        check_all(want, hidden, large)
    return list(zip(cases, map(on_cpu, wanted), strict=True)), encoder.memory()


@pytest.mark.alone
@pytest.mark.parametrize("layers_that_fit", [0, 1, 3, 6])
@pytest.mark.parametrize("use_compile", [True, False])
def test_weights_stream_from_the_host(large, large_case, layers_that_fit, use_compile):
    cases, planned = large_case
    before = settled_bytes()
    resident = layers_that_fit * LAYER_BYTES
    encoder = build(
        large, "cpu", use_compile=use_compile, device_weight_bytes=resident + LAYER_BYTES // 2
    )
    for _ in range(3):
        for hidden, want in cases:
            assert same_bits(on_cpu(encode(encoder, hidden)), want)
    held = settled_bytes() - before
    memory = encoder.memory()
    buffers = 2 * LAYER_BYTES if layers_that_fit < len(large) else 0
    slack = LAYER_BYTES // 2
    assert resident <= held
    assert held <= resident + buffers + memory["workspace_bytes"] + memory["gate_bytes"] + slack
    assert memory["workspace_bytes"] <= planned["workspace_bytes"] + buffers + slack
    assert (
        memory["screening_bytes"] == planned["screening_bytes"] == 0
    )  # bfloat16 weights screen for themselves
    assert encoder.workspace_bytes == memory["workspace_bytes"]
    del encoder
    assert settled_bytes() <= before + MIB, "device memory is not given back"


def test_two_threads_stream_weights_at_once(large):
    encoder = build(large, "cpu", device_weight_bytes=2 * LAYER_BYTES)
    cases = {tokens: rows_of(large, tokens) for tokens in (1, 40)}
    wanted = {tokens: on_cpu(encode(build(large), hidden)) for tokens, hidden in cases.items()}
    torch.cuda.synchronize()

    def work(number):
        for turn in range(10):
            tokens = (1, 40)[(number + turn) % 2]
            hidden = {i: x.clone() for i, x in cases[tokens].items()}
            assert same_bits(on_cpu(encode(encoder, hidden)), wanted[tokens])

    in_threads(2, work)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("screening", ["auto", "off", "int8"])
@pytest.mark.parametrize("room", [0, 6_000_000])  # of none or some of the layers
def test_streamed_weights_of_other_dtypes(dtype, screening, room):
    layers = alike(3, 2000, 264, dtype)
    encoder = build(layers, "cpu", device_weight_bytes=room, screening=screening)
    assert room > 0 or encoder.memory()["screening_bytes"] == 0
    for tokens in (1, 8, 40, 600):
        hidden = rows_of(layers, tokens)
        check_all(encode(encoder, hidden), hidden, layers)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("screening", SCREENINGS)
def test_bytes_of_the_screening_copies(dtype, screening):
    layers = alike(2, 2048, 256, dtype)
    memory = build(layers, screening=screening).memory()
    copied = screening != "off" and dtype != torch.bfloat16
    bf16, int8 = 2 * 2 * 2048 * 256 * copied, 2 * 2048 * (256 + 8) * (screening == "int8")
    assert memory["screening_bytes"] == bf16 + int8
    element = 4 if dtype == torch.float32 else 2
    assert memory["weight_bytes"] >= 2 * 2048 * 256 * element


@pytest.mark.parametrize(
    "value, error",
    [
        (-1, ValueError),
        (-(2**70), ValueError),
        (2**70, ValueError),
        (1.5, TypeError),
        ("1", TypeError),
    ],
)
def test_device_weight_bytes_that_make_no_sense(value, error):
    with pytest.raises(error, match="device_weight_bytes") as caught:
        build(alike(1), "cpu", device_weight_bytes=value)
    assert "\n" not in str(caught.value)


def test_hidden_must_be_where_the_encoder_works():
    layers = alike(1)
    there, here = rows_of(layers, 3), rows_of(layers, 3, device="cpu")
    for encoder, hidden in [
        (build(layers, "cpu"), there),
        (build(layers), here),
        (build(layers, "cpu", device_weight_bytes=0), here),
        (build(layers, "cpu", device_weight_bytes=1 << 40), here),
    ]:
        with pytest.raises(ValueError, match="layer 0: hidden must be on") as caught:
            encode(encoder, hidden)
        assert "\n" not in str(caught.value)
    check_all(encode(build(layers, "cpu"), here), here, layers)


# Another device


def test_the_second_device_stays_the_second():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device alone")
    second = torch.device("cuda", 1)
    layers = mixed()
    cases = [rows_of(layers, tokens) for tokens in (1, 40, 600)]
    wanted = [on_cpu(encode(build(layers), hidden)) for hidden in cases]
    resident = build(layers, second)
    with torch.cuda.device(second):
        streaming = build(layers, "cpu", device_weight_bytes=0)
    for encoder, (hidden, want) in itertools.product(
        (resident, streaming), zip(cases, wanted, strict=True)
    ):
        with pytest.raises(ValueError, match="cuda:1"):
            encode(encoder, hidden)
        there = {i: x.to(second) for i, x in hidden.items()}
        for _ in range(3):
            got = encode(encoder, there)
            assert all(got[i][name].device == second for i in got for name in RESULTS)
            assert same_bits(on_cpu(got), want)
        assert torch.cuda.current_device() == 0


# Out of memory


@pytest.fixture
def limited():
    """limited(n) lets torch take n more bytes of the device, no more."""

    def limit(more):
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, (torch.cuda.memory_reserved() + more) / total), DEVICE
        )

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


@pytest.mark.alone
@pytest.mark.parametrize(
    "where, options, named",
    [
        ("cpu", {"device_weight_bytes": 1 << 40}, "device_weight_bytes"),
        (DEVICE, {}, "screening|device_weight_bytes"),  # the bfloat16 copy finds no room
    ],
    ids=["weights", "copy"],
)
def test_out_of_memory_says_what_to_do(limited, where, options, named):
    dtype = torch.bfloat16 if where == "cpu" else torch.float32
    shape = (160 * 1024, 4096)  # 1.25 GiB in bfloat16, more than any workspace
    weights = TranscoderWeights(
        torch.zeros(shape, dtype=dtype, device=where),
        torch.zeros(shape[0], dtype=dtype, device=where),
    )
    hidden = torch.zeros(2, shape[1], device=DEVICE)
    before = settled_bytes()
    limited(1 << 30)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        SparseTranscoderEncoder({0: weights}, TOP_K, **options).encode_layer(0, hidden)
    text = str(caught.value)
    assert re.search(named, text) and re.search(r"\d{3,} bytes|\d [KMG]i?B", text), text
    assert not re.search(r"Exception raised|frame #", text), text
    del caught
    assert settled_bytes() <= before + MIB, "what was taken before the failure is not given back"
    layers = alike(1)
    hidden = rows_of(layers, 3)
    limited(32 << 30)
    check_all(encode(build(layers), hidden), hidden, layers)


@pytest.mark.alone
def test_auto_does_without_an_int8_copy_that_finds_no_room(limited):
    weights = TranscoderWeights(
        torch.zeros(160 * 1024, 4096, dtype=torch.bfloat16, device=DEVICE),
        torch.zeros(160 * 1024, dtype=torch.bfloat16, device=DEVICE),
    )
    limited(512 << 20)  # the copy needs 640 MiB
    encoder = SparseTranscoderEncoder({0: weights}, TOP_K)
    assert encoder.memory()["screening_bytes"] == 0
    with pytest.raises(torch.OutOfMemoryError, match='screening "int16" makes none of int8'):
        SparseTranscoderEncoder({0: weights}, TOP_K, screening="int8")


# What the margin of the bfloat16 screen stands on


def operands(kind, m, n, size, seed):
    """a [m, size] and b [n, size] in bfloat16."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device=DEVICE)

    if (
        kind == "cancelling"
    ):  # every row of a with every row of b: pairs that cancel, then a rest that does not
        half = size // 2
        a, b = draw(m, half), draw(n, half)
        a, b = (
            torch.cat([a, a, draw(m, size - 2 * half)], 1),
            torch.cat([b, -b, draw(n, size - 2 * half)], 1),
        )
        order = torch.randperm(size, generator=generator, device=DEVICE)
        a, b = a[:, order], b[:, order]
    elif kind == "same sign":
        a, b = draw(m, size).abs() + 0.1, draw(n, size).abs() + 0.1
    elif kind == "wide":
        a, b = (
            draw(rows, size) * torch.exp2((10 * draw(rows, size)).round().clamp(-30, 30))
            for rows in (m, n)
        )
    else:
        a, b = draw(m, size), draw(n, size)
    return a.bfloat16(), b.bfloat16()


@pytest.mark.parametrize("kind", ["random", "same sign", "cancelling", "wide"])
@pytest.mark.parametrize("size", [33, 64, 100, 576, 1000, 2048, 5120, 16384])
def test_bfloat16_product_stays_within_its_bound(kind, size):
    """|product - exact| <= gamma * sum |a b| for every pair, for any shape and torch's switches."""
    gamma = 1.25 * (size + 16) * 2.0**-22
    for seed, (m, n) in enumerate([(9, 8), (16, 4096), (64, 1000), (512, 16384), (512, 333)]):
        a, b = operands(kind, m, n, size, seed)
        exact, terms = a.double() @ b.double().T, a.double().abs() @ b.double().abs().T
        for reduced in (True, False):
            with switched("allow_bf16_reduced_precision_reduction", reduced):
                product = torch.mm(a, b.T, out_dtype=torch.float32)
            assert product.dtype == torch.float32 and product.isfinite().all()
            worst = ((product.double() - exact).abs() / terms).max().item()
            assert worst <= gamma, f"{m} x {size} x {n}: {worst / gamma:.3f} of the bound"


def test_product_on_tensor_cores_stays_within_its_bound(tmp_path):
    """|product - exact| <= bound * sum |a b| for every pair.

    With 33 rows two blocks share one of 108 to 132 multiprocessors, and with 64 three.
    """
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not here")
    tests, library = Path(__file__).parent, tmp_path / "products.so"
    command = ["nvcc", "-std=c++17", "-O3", "-arch=native", "-shared", "-Xcompiler", "-fPIC"]
    command += [f"-I{tests.parent / 'csrc'}", tests / "cuda_products.cu", "-o", library]
    subprocess.run(command, check=True)
    multiply = ctypes.CDLL(str(library)).product_tensor_bf16
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    multiply.argtypes = (pointer, integer, pointer, integer, integer, pointer)
    for kind in ("random", "same sign", "cancelling", "wide"):
        for size in (8, 24, 104, 576, 2048, 5120, 16384):
            bound = (size // 16 + 84) * 2.0**-24
            for seed, rows in enumerate((5, 16, 20, 32, 33, 64)):
                a, b = operands(kind, rows, 600 * rows, size, seed)
                got = torch.empty(rows, len(b), device=DEVICE)
                torch.cuda.synchronize()
                assert not multiply(a.data_ptr(), rows, b.data_ptr(), len(b), size, got.data_ptr())
                torch.cuda.synchronize()
                exact, terms = a.double() @ b.double().T, a.double().abs() @ b.double().abs().T
                worst = ((got.double() - exact).abs() / terms).max().item()
                assert worst <= bound, f"{kind} {rows} x {size}: {worst / bound:.3f} of the bound"


# Rows made to go wrong


def hard_rows(size, dtype):
    """[16, size]: broken, huge, tiny, empty, equal and one-sided rows among plain ones."""
    max_value, min_value = (6e4, 1e-7) if dtype == torch.float16 else (1e30, 1e-39)
    x = normal(16, size, seed=3)
    x[1, size // 2], x[2, 0], x[3, -1] = math.nan, math.inf, -math.inf
    x[4] *= max_value / x[4].abs().max()
    x[5] *= min_value
    x[6], x[7] = 0.0, -0.0
    x[8], x[9] = x[0], x[0]
    x[10], x[11] = 1.0, -1.0
    x[12, 1:] = 0.0
    x[13, 3] = max_value
    return x.to(DEVICE, dtype)


@pytest.mark.parametrize("weight_dtype", FLOATS)
@pytest.mark.parametrize("hidden_dtype", FLOATS)
@pytest.mark.parametrize("screening", ["auto", "off"])
def test_hard_rows(weight_dtype, hidden_dtype, screening):
    layer = make_layer(1003, 77, dtype=weight_dtype)
    layer["W_enc"][500:520] = layer["W_enc"][:20].clone()  # duplicates
    layer["b_enc"][500:520] = layer["b_enc"][:20].clone()
    layer["W_enc"][700:] *= 1e-4
    hard = hard_rows(77, hidden_dtype)
    rows = [*hard.split(1), hard[:5], hard[4:9], hard.repeat(38, 1)[:600]]
    for top_k, tau in ((TOP_K, TAU), (1003, 0.0), (5000, TAU)):
        encoder = build({0: layer}, top_k=top_k, tau=tau, screening=screening)
        whole = encode(encoder, {0: hard})
        check_all(whole, {0: hard}, {0: layer}, top_k, tau, unit=False)
        for hidden in rows:
            got = [encode(encoder, {0: hidden}) for _ in range(3)]
            check_all(got[0], {0: hidden}, {0: layer}, top_k, tau, unit=False)
            assert same_bits(got[1], got[0]) and same_bits(got[2], got[0])
        for number, hidden in enumerate(hard.split(1)):  # whatever stands beside a row
            alone = encode(encoder, {0: hidden})[0]
            assert all(same_bits(alone[name][0], whole[0][name][number]) for name in RESULTS), (
                f"row {number}"
            )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [1, 5, 600])
@pytest.mark.parametrize("features, size", [(20_000, 104), (19_997, 101)])
def test_dense_rows(dtype, tokens, features, size):
    """Half of all features are active: every list overflows."""
    layers = {0: make_layer(features, size, dtype=dtype)}
    hidden = rows_of(layers, tokens)
    for top_k in (50, 3000) if tokens < 600 else (50,):
        check_all(encode(build(layers, top_k=top_k, tau=0.0), hidden), hidden, layers, top_k, 0.0)


@pytest.mark.parametrize("use_compile", [True, False])
@pytest.mark.parametrize("tokens", [1, 32])
def test_dense_rows_of_large_layers(tokens, use_compile):
    """Features crowd at their gates: "auto" leaves the int8 screen, and tries it again."""
    layers = {i: make_layer(4096, 4096, seed=10 * i, dtype=torch.bfloat16) for i in range(2)}
    encoder = build(layers, tau=1.0, use_compile=use_compile)
    memory = encoder.memory()
    assert memory["screening_bytes"] == 2 * 4096 * (4096 + 8), "auto makes int8 copies"
    hidden = rows_of(layers, tokens)
    for call in range(1, 301):
        got = encode(encoder, hidden)
        if call in (1, 2, 10, 257, 258, 300):  # the host waits here, and runs ahead of the others
            check_all(got, hidden, layers, tau=1.0)


@pytest.mark.parametrize("tokens", [1, 600])
def test_every_feature_is_active(tokens):
    layer = make_layer(5001, 64)
    layer["b_enc"] += 100.0
    hidden = normal(tokens, 64).to(DEVICE)
    for top_k in (1, 50, 5001):
        got = encode(build({0: layer}, top_k=top_k, tau=0.0), {0: hidden})
        check_all(got, {0: hidden}, {0: layer}, top_k, 0.0)
        assert (got[0]["sparsity"] == 1).all()


@pytest.mark.parametrize(
    "tokens", [0, 1, 2, 7, 8, 9, 16, 17, 32, 33, 63, 64, 65, 511, 512, 513, 1025]
)
def test_rows_about_the_sizes_where_the_path_changes(tokens):
    layers = mixed()
    encoder = build(layers)
    for seed in range(3):
        hidden = rows_of(layers, tokens, seed)
        check_all(encode(encoder, hidden), hidden, layers)
