"""The reference project's transcoder_L{n}.pt."""

import pickle

import pytest
import torch
from checkpoints import Bomb, Written, ints, load, put, relu
from every_layout import EveryLayout
from oracle import normal
from sparse_transcoder import SparseTranscoderEncoder
from test_native import F, H, encodes_like, equal


def reference(root, i, F, H):
    """Without LayerNorm, whose results are no whole numbers."""
    W_enc, b_enc = ints(F, H, seed=i + 1), ints(F, seed=i + 2)
    W_dec, b_dec = ints(H, F, seed=i + 3), ints(H, seed=i + 4)
    state = {"enc.1.weight": W_enc, "enc.1.bias": b_enc, "dec.weight": W_dec, "dec.bias": b_dec}
    put(root, f"transcoder_L{i}.pt", state)
    return Written(lambda x: relu(x @ W_enc.T + b_enc), W_enc, W_dec, b_dec)


class TestReference(EveryLayout):
    WRITERS = (reference,)


def reference_state(prefix="", norm=False, tied=False, targets=1, features=F, hidden_size=H):
    state = {
        "dec.weight": normal(hidden_size * targets, features, seed=1),
        "dec.bias": normal(hidden_size * targets, seed=2),
    }
    if norm:
        state |= {
            "enc.0.weight": 1 + 0.3 * normal(hidden_size, seed=3),
            "enc.0.bias": 0.3 * normal(hidden_size, seed=4),
        }
    if not tied:
        state |= {
            "enc.1.weight": normal(features, hidden_size, seed=5),
            "enc.1.bias": normal(features, seed=6),
        }
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("features, hidden_size", [(F, H), (12, 12)])
def test_reference(tmp_path, prefix, norm, tied, features, hidden_size):
    state = reference_state(prefix, norm, tied, 1, features, hidden_size)
    torch.save(
        {"state_dict": state, "config": {"lr": 1e-3}, "step": 5}, tmp_path / "transcoder_L3.pt"
    )
    loaded = load(tmp_path)
    assert list(loaded) == [3]
    weights, plain = (
        loaded[3],
        {name.removeprefix("_orig_mod."): value for name, value in state.items()},
    )
    layer = {"W_enc": plain["dec.weight"].T, "b_enc": torch.zeros(features)}
    if not tied:
        layer = {"W_enc": plain["enc.1.weight"], "b_enc": plain["enc.1.bias"]}
    if norm:
        layer |= {"ln_weight": plain["enc.0.weight"], "ln_bias": plain["enc.0.bias"]}
    assert all(equal(getattr(weights, name), value) for name, value in layer.items())
    assert equal(weights.W_dec, plain["dec.weight"]) and equal(weights.b_dec, plain["dec.bias"])
    assert weights.layer == 3 and weights.threshold is None and weights.k is None
    assert norm or weights.ln_weight is None
    encodes_like(weights, layer, 3 + 2 * normal(20, hidden_size))


@pytest.mark.parametrize("norm", [True, False])
def test_reference_with_many_targets(tmp_path, norm):
    state = reference_state(norm=norm, targets=3)
    torch.save({"state_dict": state}, tmp_path / "transcoder_L0.pt")
    weights = load(tmp_path)[0]
    assert equal(weights.W_enc, state["enc.1.weight"])
    layer = {"W_enc": weights.W_enc, "b_enc": weights.b_enc}
    encodes_like(
        weights,
        layer | ({"ln_weight": weights.ln_weight, "ln_bias": weights.ln_bias} if norm else {}),
    )


def test_reference_layers(tmp_path):
    for i in (0, 2, 10):
        torch.save({"state_dict": reference_state()}, tmp_path / f"transcoder_L{i}.pt")
    assert list(load(tmp_path)) == [0, 2, 10]
    (tmp_path / "transcoder_L2.pt").write_bytes(b"no archive")
    assert list(load(tmp_path, [10])) == [10]


@pytest.mark.parametrize("form", ["archive", "legacy", "bare pickle", "beside good weights"])
def test_pickled_code_is_refused_and_not_run(tmp_path, form):
    path, marker = tmp_path / "transcoder_L0.pt", tmp_path / "ran"
    content = {"state_dict": reference_state() | {"enc.1.bias": Bomb(marker)}}
    if form == "beside good weights":
        content = {"state_dict": reference_state(), "config": Bomb(marker)}
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(ValueError) as caught:
        load(tmp_path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text
    assert "weights_only=False" not in text  # torch's own advice is to open the door
    assert not marker.exists()


@pytest.mark.parametrize(
    "content, word",
    [
        ({"weights": {}}, "state_dict"),
        ([1, 2], "state_dict"),
        ({"state_dict": {}}, "dec.weight"),
        (
            {"state_dict": {n: v for n, v in reference_state().items() if n != "enc.1.bias"}},
            "enc.1.bias",
        ),
        (
            {
                "state_dict": {
                    n: v for n, v in reference_state(norm=True).items() if n != "enc.0.bias"
                }
            },
            "enc.0.bias",
        ),
        (
            {"state_dict": reference_state() | {"enc.1.bias": torch.zeros(F + 1)}},
            "transcoder_L0.pt",
        ),
        ({"state_dict": reference_state() | {"enc.1.bias": 3.0}}, "transcoder_L0.pt"),
        ({"state_dict": reference_state() | {"enc.1.weight": torch.zeros(F)}}, "transcoder_L0.pt"),
        (
            {"state_dict": reference_state() | {"enc.1.weight": torch.full((F, H), torch.nan)}},
            "transcoder_L0.pt",
        ),
        (
            {"state_dict": reference_state(norm=True) | {"enc.0.weight": torch.ones(H + 1)}},
            "transcoder_L0.pt",
        ),
        (
            {"state_dict": reference_state() | {"enc.1.weight": torch.zeros(F, H).double()}},
            "transcoder_L0.pt",
        ),
    ],
)
def test_reference_files_that_are_not_whole(tmp_path, content, word):
    path = tmp_path / "transcoder_L0.pt"
    torch.save(content, path)
    with pytest.raises((ValueError, TypeError)) as caught:
        SparseTranscoderEncoder(load(tmp_path))
    text = str(caught.value)
    assert str(path) in text and word in text and "\n" not in text


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04" + bytes(100)])
def test_reference_files_that_are_no_archive(tmp_path, content):
    (tmp_path / "transcoder_L0.pt").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load(tmp_path)
    assert str(tmp_path / "transcoder_L0.pt") in str(caught.value) and "\n" not in str(caught.value)
