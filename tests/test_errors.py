"""Each mistake of a caller: its type, its words, in one line; and the silence of what is right."""

import math
import re
import warnings

import numpy
import pytest
import torch
from oracle import SCREENINGS, check, make_layer, normal, same_bits
from safetensors.torch import save_file
from sparse_transcoder import (
    SparseTranscoderEncoder,
    TranscoderWeights,
    encode_single_layer,
    load_transcoders,
)

NAN, INF = math.nan, math.inf
INTERNALS = (
    "Exception raised from",
    "frame #",
    "c10::",
    "at::",
    "std::",
    ".cpp",
    ".so",
    "0x",
    "supported:",
)


def refused(call, error, *words):
    """The call raises exactly this kind of error, in one line with these words and no backtrace."""
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value.args[0])
    assert type(caught.value) in (error if isinstance(error, tuple) else (error,)), repr(
        caught.value
    )
    assert text and "\n" not in text and not any(internal in text for internal in INTERNALS), text
    missing = [
        word for word in words if not re.search(rf"(?<![\w.]){re.escape(str(word))}(?![\w])", text)
    ]
    assert not missing, f"{text!r} does not say {missing}"
    return text


def weights(layer=0, features=30, hidden_size=8, **changes):
    return TranscoderWeights(**{**make_layer(features, hidden_size), "layer": layer, **changes})


def encoder(**options):
    return SparseTranscoderEncoder({41: weights(41), 3: weights(3, hidden_size=5)}, **options)


def holding(shape, value):
    tensor = torch.zeros(shape)
    tensor.view(-1)[-1] = value
    return tensor


# Hidden states


@pytest.mark.parametrize(
    "method",
    ["encode_layer", "encode_chunked", "encode_all_layers", "extract_attribution_features"],
)
@pytest.mark.parametrize(
    "hidden, error, words",
    [
        (torch.zeros(1, 256, 9), ValueError, ["layer 41: hidden must be [.., 8], got [1, 256, 9]"]),
        (torch.zeros(7, 5), ValueError, ["layer 41: hidden must be [.., 8], got [7, 5]"]),
        (torch.zeros(0, 9), ValueError, ["layer 41", "[0, 9]"]),
        (torch.zeros(8), ValueError, ["layer 41", "[8]"]),
        (torch.zeros(()), ValueError, ["layer 41", "[]"]),
        (torch.zeros(2, 2, 2, 8), ValueError, ["layer 41", "[2, 2, 2, 8]"]),
        (torch.zeros(2, 8, device="meta"), ValueError, ["layer 41", "cpu", "meta"]),
        (torch.zeros(2, 8, dtype=torch.float64), TypeError, ["layer 41", "float64"]),
        (torch.zeros(2, 8, dtype=torch.int64), TypeError, ["layer 41", "int64"]),
        (torch.zeros(2, 8, dtype=torch.bool), TypeError, ["layer 41", "bool"]),
        (torch.zeros(2, 8, dtype=torch.complex64), TypeError, ["layer 41", "complex64"]),
        ([[0.0] * 8], TypeError, ["layer 41", "list"]),
        (numpy.zeros((2, 8), "float32"), TypeError, ["layer 41", "ndarray"]),
        (None, TypeError, ["layer 41", "NoneType"]),
    ],
)
def test_hidden(method, hidden, error, words):
    if method in ("encode_layer", "encode_chunked"):
        refused(lambda: getattr(encoder(), method)(41, hidden), error, *words)
    else:
        refused(
            lambda: getattr(encoder(), method)({3: torch.zeros(2, 5), 41: hidden}), error, *words
        )


def test_sparse_hidden():
    with pytest.raises((TypeError, ValueError)) as caught:
        encoder().encode_layer(41, torch.zeros(2, 8).to_sparse())
    assert "\n" not in str(caught.value) and "layer 41" in str(caught.value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested(layout):
    nested = torch.nested.nested_tensor([torch.zeros(2, 8), torch.zeros(3, 8)], layout=layout)
    for method in ("encode_layer", "encode_chunked", "encode_sparse"):
        refused(
            lambda method=method: getattr(encoder(), method)(41, nested),
            ValueError,
            "layer 41",
            "hidden",
            "nested",
        )
    changed = {"W_enc": nested, "b_enc": nested, "W_dec": nested}
    for name, tensor in changed.items():
        refused(
            lambda c={name: tensor}: SparseTranscoderEncoder({3: weights(3, **c)}),
            ValueError,
            "layer 3",
            name,
        )


@pytest.mark.parametrize("method", ["encode_layer", "encode_chunked"])
@pytest.mark.parametrize("layer", [0, 4, -1, 410])
def test_unknown_layer(method, layer):
    refused(lambda: getattr(encoder(), method)(layer, torch.zeros(2, 8)), KeyError, layer, 3, 41)


@pytest.mark.parametrize("layer", ["41", None, 41.5])
def test_layer_that_is_no_number(layer):
    refused(lambda: encoder().encode_layer(layer, torch.zeros(2, 8)), (TypeError, KeyError))


@pytest.mark.parametrize("method", ["encode_all_layers", "extract_attribution_features"])
@pytest.mark.parametrize(
    "states, name",
    [([torch.zeros(2, 8)], "list"), (torch.zeros(2, 8), "Tensor"), (None, "NoneType")],
)
def test_hidden_states_that_are_no_dict(method, states, name):
    refused(lambda: getattr(encoder(), method)(states), TypeError, name)


def test_a_failed_call_leaves_the_encoder_whole():
    whole = encoder(top_k=5)
    hidden = normal(4, 8)
    want = whole.encode_layer(41, hidden)
    for _ in range(3):
        refused(lambda: whole.encode_all_layers({41: hidden, 3: hidden}), ValueError, "layer 3")
        refused(lambda: whole.encode_layer(41, hidden.double()), TypeError, "layer 41")
    assert same_bits(whole.encode_layer(41, hidden), want)


# Layers with no transcoder


def test_layers_with_no_transcoder_are_named_once():
    hidden = normal(4, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = encoder().encode_all_layers({7: hidden, 41: hidden, 19: hidden})
    assert list(got) == [41]
    check(got[41], hidden, make_layer(30, 8), 20, 1.0)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "\n" not in text
    assert [len(re.findall(rf"\b{layer}\b", text)) for layer in (7, 19)] == [1, 1]
    assert caught[0].filename == __file__  # it points at the caller


def test_no_layer_left():
    with pytest.warns(Warning, match=r"\b7\b"):
        assert encoder().encode_all_layers({7: torch.zeros(2, 8)}) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encoder().encode_all_layers({}) == {}


# Options


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"top_k": 0}, ValueError, ["top_k", "0"]),
        ({"top_k": -3}, ValueError, ["top_k", "-3"]),
        ({"top_k": "20"}, TypeError, ["top_k", "str"]),
        ({"top_k": 2.5}, TypeError, ["top_k", "float"]),
        ({"chunk_size": 0}, ValueError, ["chunk_size", "0"]),
        ({"chunk_size": -512}, ValueError, ["chunk_size", "-512"]),
        ({"chunk_size": "512"}, TypeError, ["chunk_size", "str"]),
        ({"activation_threshold": NAN}, ValueError, ["activation_threshold"]),
        ({"activation_threshold": "1"}, TypeError, ["activation_threshold", "str"]),
        ({"activation_threshold": None}, TypeError, ["activation_threshold", "NoneType"]),
        ({"device_weight_bytes": -1}, ValueError, ["device_weight_bytes", "at least 0", "-1"]),
        ({"device_weight_bytes": 1.5}, TypeError, ["device_weight_bytes", "integer", "float"]),
        ({"screening": "fp4"}, ValueError, ["screening", "fp4", *SCREENINGS]),
        ({"screening": ""}, ValueError, ["screening", "auto", "off"]),
        ({"screening": None}, (TypeError, ValueError), ["screening", "None"]),
        ({"screening": []}, ValueError, ["screening", "[]"]),
        ({"top_k": None}, ValueError, ["top_k", "layer 3"]),
        ({"top_k": 2**63}, ValueError, ["top_k", 2**63]),
        ({"chunk_size": 2**63}, ValueError, ["chunk_size", 2**63]),
        ({"activation_threshold": 10**400}, ValueError, ["activation_threshold"]),
        ({"activation_threshold": torch.ones(2)}, ValueError, ["activation_threshold"]),
    ],
)
def test_options(options, error, words):
    refused(lambda: encoder(**options), error, *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_streamed_weights_need_a_cuda_device():
    refused(
        lambda: encoder(device_weight_bytes=0), ValueError, "device_weight_bytes", "CUDA device"
    )


@pytest.mark.parametrize("value", [0, -1])
def test_top_k_global(value):
    refused(
        lambda: encoder().extract_attribution_features({41: normal(2, 8)}, top_k_global=value),
        ValueError,
        "top_k_global",
        value,
    )


@pytest.mark.parametrize(
    "transcoders, error, words",
    [
        ([1], TypeError, ["list"]),
        (None, TypeError, ["NoneType"]),
        ({3: torch.zeros(4, 4)}, TypeError, ["layer 3", "TranscoderWeights", "Tensor"]),
        ({"3": weights(3)}, TypeError, ["str"]),
        ({2**63: weights(3)}, ValueError, ["layer", 2**63]),
    ],
)
def test_transcoders(transcoders, error, words):
    refused(lambda: SparseTranscoderEncoder(transcoders), error, *words)


# Weights: F 30, H 8


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"b_enc": torch.zeros(31)}, ValueError, ["b_enc", "30", "31"]),
        ({"b_enc": torch.zeros(30, 1)}, ValueError, ["b_enc", "[30, 1]"]),
        ({"W_enc": torch.zeros(31, 8)}, ValueError, ["30", "31"]),
        ({"W_enc": torch.zeros(30)}, ValueError, ["W_enc", "[30]"]),
        ({"W_enc": torch.zeros(30, 8, 1)}, ValueError, ["W_enc", "[30, 8, 1]"]),
        ({"W_enc": torch.zeros(30, 0)}, ValueError, ["W_enc", "[30, 0]"]),
        ({"W_enc": torch.zeros(0, 8), "b_enc": torch.zeros(0)}, ValueError, ["W_enc", "[0, 8]"]),
        ({"W_enc": torch.zeros(30, 8).double()}, TypeError, ["W_enc", "float64"]),
        ({"W_enc": torch.zeros(30, 8).int()}, TypeError, ["W_enc", "int32"]),
        ({"b_enc": torch.zeros(30).double()}, TypeError, ["b_enc", "float64"]),
        ({"W_enc": [[0.0]]}, TypeError, ["W_enc", "list"]),
        ({"b_enc": None}, TypeError, ["b_enc", "NoneType"]),
        ({"b_enc": torch.zeros(30, device="meta")}, ValueError, ["b_enc", "meta"]),
        ({"W_enc": holding((30, 8), NAN)}, ValueError, ["W_enc"]),
        ({"W_enc": holding((30, 8), INF)}, ValueError, ["W_enc"]),
        ({"W_enc": holding((30, 8), -INF).bfloat16()}, ValueError, ["W_enc"]),
        ({"b_enc": holding(30, NAN)}, ValueError, ["b_enc"]),
        ({"b_enc": holding(30, INF)}, ValueError, ["b_enc"]),
        ({"threshold": torch.zeros(29)}, ValueError, ["threshold", "29", "30"]),
        ({"threshold": torch.zeros(())}, ValueError, ["threshold"]),
        ({"threshold": holding(30, NAN)}, ValueError, ["threshold"]),
        ({"threshold": 0.5}, TypeError, ["threshold", "float"]),
        ({"k": 0}, ValueError, ["k", "0"]),
        ({"k": -1}, ValueError, ["k", "-1"]),
        ({"k": 2.5}, TypeError, ["k", "float"]),
        ({"k": 2**63}, ValueError, ["k", 2**63]),
        ({"hook_in": 3}, TypeError, ["hook_in", "int"]),
        ({"W_dec": torch.zeros(30, 8)}, ValueError, ["W_dec", "[30, 8]"]),
        ({"b_dec": torch.zeros(30)}, ValueError, ["b_dec", "30", "8"]),
        ({"W_skip": torch.zeros(8, 9)}, ValueError, ["W_skip", "[8, 9]", "[8, 8]"]),
        ({"input_bias": torch.zeros(30)}, ValueError, ["input_bias", "30", "8"]),
        ({"input_bias": holding(8, NAN)}, ValueError, ["input_bias"]),
        (
            {"ln_weight": torch.zeros(9), "ln_bias": torch.zeros(8)},
            ValueError,
            ["ln_weight", "9", "8"],
        ),
        (
            {"ln_weight": torch.zeros(8), "ln_bias": torch.zeros(9)},
            ValueError,
            ["ln_bias", "9", "8"],
        ),
        ({"ln_weight": torch.zeros(8)}, ValueError, ["ln_weight", "ln_bias"]),
    ],
)
def test_weights(changes, error, words):
    refused(lambda: SparseTranscoderEncoder({3: weights(3, **changes)}), error, "layer 3", *words)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"hidden": torch.zeros(2, 9)}, ValueError, ["hidden", "[2, 9]", "8"]),
        ({"hidden": torch.zeros(8)}, ValueError, ["hidden", "[8]"]),
        ({"hidden": torch.zeros(2, 8).double()}, TypeError, ["hidden", "float64"]),
        ({"hidden": [0.0]}, TypeError, ["hidden", "list"]),
        ({"W_enc": torch.zeros(30)}, ValueError, ["W_enc", "[30]"]),
        ({"W_enc": torch.zeros(30, 8).double()}, TypeError, ["W_enc", "float64"]),
        ({"b_enc": torch.zeros(4)}, ValueError, ["b_enc", "30", "4"]),
        ({"top_k": 0}, ValueError, ["top_k", "0"]),
        ({"threshold": NAN}, ValueError, ["threshold"]),
    ],
)
def test_encode_single_layer(arguments, error, words):
    whole = {
        "hidden": torch.zeros(2, 8),
        "W_enc": torch.zeros(30, 8),
        "b_enc": torch.zeros(30),
        "top_k": 5,
        "threshold": 1.0,
    }
    text = refused(lambda: encode_single_layer(**{**whole, **arguments}), error)
    assert all(word in text for word in words), text


# Loading


def test_folder_that_is_not_there(tmp_path):
    refused(lambda: load_transcoders(tmp_path / "absent"), FileNotFoundError, tmp_path / "absent")
    refused(
        lambda: load_transcoders(str(tmp_path / "absent"), layers=[1]),
        FileNotFoundError,
        tmp_path / "absent",
    )


def test_folder_with_nothing_to_load(tmp_path):
    (tmp_path / "readme.txt").write_text("no weights")
    refused(lambda: load_transcoders(tmp_path), (FileNotFoundError, ValueError), tmp_path)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"transcoder_dir": None}, TypeError, ["transcoder_dir", "NoneType"]),
        ({"layers": 3}, TypeError, ["layers", "int"]),
        ({"layers": "3"}, TypeError, ["layers", "str"]),
        ({"layers": ["3"]}, TypeError, ["layer", "str"]),
        ({"layers": [3.5]}, TypeError, ["layer", "float"]),
        ({"layers": [2**63]}, ValueError, ["layer", 2**63]),
        ({"device": "gpu"}, ValueError, ["device", "gpu"]),
        ({"device": ""}, ValueError, ["device"]),
        ({"device": "meta"}, ValueError, ["device", "cpu", "cuda", "meta"]),
        ({"device": "cuda:99"}, ValueError, ["device", "cuda:99"]),
        ({"device": 99}, ValueError, ["device", "99"]),
    ],
)
def test_loading_arguments(tmp_path, arguments, error, words):
    save_file({"W_enc": torch.ones(4, 3), "b_enc": torch.ones(4)}, tmp_path / "layer_3.safetensors")
    given = {"transcoder_dir": tmp_path, "layers": None, "device": "cpu", **arguments}
    refused(lambda: load_transcoders(**given), error, *words)


# Decoding


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"activations": None}, TypeError, ["activations", "NoneType"]),
        (
            {"activations": torch.zeros(2, 5).double()},
            TypeError,
            ["activations", "float32", "float64"],
        ),
        ({"indices": torch.zeros(2, 5).int()}, TypeError, ["int64", "int32"]),
        ({"indices": torch.zeros(2, 4).long()}, ValueError, ["[2, 5]", "[2, 4]"]),
        ({"indices": torch.full((2, 5), 30)}, ValueError, ["30"]),
    ],
)
def test_decode(changes, error, words):
    whole = SparseTranscoderEncoder({3: weights(3, W_dec=torch.ones(8, 30))}, top_k=5)
    features = whole.encode_layer(3, torch.zeros(2, 8))
    refused(lambda: whole.decode(3, {**features, **changes}), error, "layer 3", *words)
    refused(lambda: whole.decode(3, {"activations": None}), ValueError, "layer 3", "indices")


# Out of memory


def test_out_of_memory_says_what_it_wanted():
    """2^50 rows that are one row in memory: the outputs alone are beyond any address space."""
    hidden = torch.zeros(1, 8).expand(2**50, 8)
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        encoder().encode_layer(41, hidden)
    text = str(caught.value)
    assert (
        "\n" not in text and re.search(r"\d{4,}", text) and re.search("top_k|chunk_size", text)
    ), text
    with pytest.raises(
        (MemoryError, RuntimeError),
        match=r"^layer 41: out of memory: .* \d{15,} bytes .* fewer rows",
    ):
        encoder().encode_sparse(41, hidden)


# Silence


def test_nothing_is_printed(capfd):
    whole = encoder()
    hidden = {41: normal(2, 8), 3: normal(2, 5)}
    whole.encode_all_layers(hidden)
    whole.extract_attribution_features(hidden)
    whole.memory()
    assert capfd.readouterr() == ("", "")
