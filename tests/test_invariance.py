"""The same input gives the same bits, whatever the chunks, the batch, the layers, the threads."""

import sys
import threading
import time

import pytest
import torch
from oracle import SCREENINGS, make_layer, normal, on, same_bits
from sparse_transcoder import SparseTranscoderEncoder, TranscoderWeights

TOKENS, HIDDEN, FEATURES, TOP_K = 150, 200, 3000, 33
RESULTS = ("activations", "indices", "sparsity")


def layers_of(device):
    layers = {
        0: make_layer(FEATURES, HIDDEN),
        1: make_layer(700, HIDDEN, kind="jumprelu", dtype=torch.bfloat16),
        2: make_layer(257, 31, kind="topk"),
        5: make_layer(
            65,
            HIDDEN,
            ln_weight=1 + 0.3 * normal(HIDDEN, seed=7),
            ln_bias=0.3 * normal(HIDDEN, seed=8),
        ),
        9: make_layer(4100, 64, dtype=torch.float16),
    }
    layers[0]["W_enc"][1::7] = layers[0]["W_enc"][
        0
    ].clone()  # ties, and rows whose top k is mostly ties
    layers[0]["b_enc"][1::7] = layers[0]["b_enc"][0].clone()
    return {i: TranscoderWeights(**on(layer, device), layer=i) for i, layer in layers.items()}


def build(device, top_k=TOP_K, tau=0.5, **options):
    return SparseTranscoderEncoder(layers_of(device), top_k, tau, **options)


def hidden_of(device, weights, tokens=TOKENS, dtype=torch.float32):
    hidden = {i: normal(tokens, w.W_enc.shape[1], seed=100 + i) for i, w in weights.items()}
    for rows in hidden.values():
        rows[tokens // 2, 0] = float("nan")
        rows[tokens // 3] *= 1e4
    return {i: rows.to(device, dtype) for i, rows in hidden.items()}


@pytest.fixture(scope="module")
def case():
    made = {}

    def get(device):
        if device not in made:
            hidden = hidden_of(device, layers_of(device))
            made[device] = hidden, build(device).encode_all_layers(hidden)
        return made[device]

    return get


def rows_of(result, rows):
    return {name: result[name][rows] for name in RESULTS}


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 32, 64, TOKENS - 1, TOKENS, TOKENS + 1, 10_000])
@pytest.mark.parametrize("use_compile", [True, False])
def test_chunk_size(device, case, chunk_size, use_compile):
    hidden, want = case(device)
    encoder = build(device, chunk_size=chunk_size, use_compile=use_compile)
    for i in hidden:
        for _ in range(2):  # a shape seen before may be replayed
            assert same_bits(encoder.encode_layer(i, hidden[i]), want[i])
        assert same_bits(encoder.encode_chunked(i, hidden[i]), want[i])
    assert same_bits(encoder.encode_all_layers(hidden), want)


@pytest.mark.parametrize("screening", SCREENINGS)
def test_screening(device, case, screening):
    hidden, want = case(device)
    assert same_bits(build(device, screening=screening).encode_all_layers(hidden), want)


def test_one_row_alone(device, case):
    hidden, want = case(device)
    encoder = build(device)
    for i in hidden:
        for row in (0, 1, 49, 50, 75, TOKENS - 1):
            assert same_bits(
                rows_of(encoder.encode_layer(i, hidden[i][row : row + 1]), 0), rows_of(want[i], row)
            )


@pytest.mark.parametrize("start, stop", [(0, 2), (1, 34), (3, 67), (40, 105), (100, TOKENS)])
def test_some_rows(device, case, start, stop):
    hidden, want = case(device)
    encoder = build(device)
    some = encoder.encode_all_layers({i: rows[start:stop] for i, rows in hidden.items()})
    for i in hidden:
        assert same_bits(rows_of(some[i], slice(None)), rows_of(want[i], slice(start, stop)))


def test_order_of_rows(device, case):
    hidden, want = case(device)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0)).to(device)
    got = build(device).encode_all_layers({i: rows[order] for i, rows in hidden.items()})
    for i in hidden:
        assert same_bits(rows_of(got[i], slice(None)), rows_of(want[i], order))


@pytest.mark.parametrize("batch", [1, 2, 3, 50, TOKENS])
def test_batch(device, case, batch):
    hidden, want = case(device)
    encoder = build(device)
    for i, rows in hidden.items():
        got = encoder.encode_layer(i, rows.reshape(batch, TOKENS // batch, -1))
        assert same_bits(
            {name: got[name].flatten(0, 1) for name in RESULTS}, rows_of(want[i], slice(None))
        )


def test_layer_alone_or_among_others(device, case):
    hidden, want = case(device)
    every = layers_of(device)
    for i in hidden:
        alone = SparseTranscoderEncoder({i: every[i]}, TOP_K, 0.5)
        assert same_bits(alone.encode_layer(i, hidden[i]), want[i])
    encoder = build(device)
    for some in ([0], [9, 0], [5, 2, 1]):
        got = encoder.encode_all_layers({i: hidden[i] for i in some})
        assert same_bits(got, {i: want[i] for i in some})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_of_hidden(device, dtype):
    hidden = hidden_of(device, layers_of(device), dtype=dtype)
    want = build(device).encode_all_layers(hidden)
    for chunk_size in (1, 33):
        assert same_bits(build(device, chunk_size=chunk_size).encode_all_layers(hidden), want)


def test_place_in_memory(device, case):
    """Rows that start at odd addresses, or stand apart, hold the same numbers."""
    hidden, want = case(device)
    encoder = build(device)
    for i, rows in hidden.items():
        for shift in (1, 3):
            held = torch.empty(TOKENS, rows.shape[1] + 5, device=device)[
                :, shift : shift + rows.shape[1]
            ]
            assert same_bits(encoder.encode_layer(i, held.copy_(rows)), want[i])


def test_again_and_again(device, case):
    """Nothing is left over from the calls before, other shapes among them."""
    hidden, want = case(device)
    encoder = build(device, chunk_size=64)
    for tokens in (TOKENS, 1, 64, TOKENS, 65, 0, TOKENS):
        got = encoder.encode_all_layers({i: rows[:tokens] for i, rows in hidden.items()})
        for i in hidden:
            assert same_bits(rows_of(got[i], slice(None)), rows_of(want[i], slice(tokens)))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_number_of_threads(case, threads, count):
    hidden, want = case(torch.device("cpu"))
    threads(count)
    encoder = build("cpu")
    assert same_bits(encoder.encode_all_layers(hidden), want)
    for i in hidden:
        assert same_bits(encoder.encode_layer(i, hidden[i]), want[i])
        assert same_bits(rows_of(encoder.encode_layer(i, hidden[i][7:8]), 0), rows_of(want[i], 7))


@pytest.mark.parametrize("use_compile", [True, False])
def test_eight_threads_on_one_encoder(device, case, use_compile):
    hidden, want = case(device)
    encoder = build(device, chunk_size=40, use_compile=use_compile)
    together, failures = threading.Barrier(8), []

    def work(number):
        try:
            together.wait()
            for turn in range(4):
                i = list(hidden)[(number + turn) % len(hidden)]
                start = 11 * number
                part = rows_of(want[i], slice(start, None))
                assert same_bits(
                    rows_of(encoder.encode_layer(i, hidden[i][start:]), slice(None)), part
                )
                assert same_bits(
                    rows_of(encoder.encode_layer(i, hidden[i][start : start + 1]), 0),
                    rows_of(want[i], start),
                )
                if turn % 2:
                    assert same_bits(encoder.encode_all_layers(hidden), want)
        except BaseException as error:
            failures.append(error)
            together.abort()

    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures[0]


def test_interpreter_lock_is_released():
    """While one thread encodes, this one takes the lock, which it could not if it were held."""
    encoder = SparseTranscoderEncoder({0: TranscoderWeights(**make_layer(16384, 256))}, 20)
    hidden = normal(4096, 256)
    begun, done = threading.Event(), threading.Event()

    def work():
        begun.set()
        encoder.encode_layer(0, hidden)
        done.set()

    interval, turns = sys.getswitchinterval(), 0
    sys.setswitchinterval(1000)  # no thread gives the lock up unless it means to
    try:
        worker = threading.Thread(target=work)
        worker.start()
        begun.wait()
        while not done.is_set():
            time.sleep(0.0005)
            turns += 1
        worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert turns > 20
