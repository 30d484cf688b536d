"""Weights and encoders as pickles and copies: an encoder travels as its weights and options."""

import copy
import dataclasses
import pickle
import subprocess
import sys

import pytest
from oracle import normal, same_bits
from sparse_transcoder import SparseTranscoderEncoder, TranscoderWeights, load_transcoders
from sparse_transcoder import save_transcoders as save

F, H = 60, 12
COPIES = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "pickle of protocol 2": lambda value: pickle.loads(pickle.dumps(value, protocol=2)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}
every_copy = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())


def weights(layer, **more):
    return TranscoderWeights(normal(F, H, seed=layer), normal(F), layer=layer, **more)


def full():
    return weights(
        3,
        W_dec=normal(F, H).bfloat16().T,
        b_dec=normal(H),
        threshold=normal(F).abs(),
        k=7,
        W_skip=normal(H, H),
        input_bias=normal(H),
        ln_weight=normal(H),
        ln_bias=normal(H),
        hook_in="mlp.hook_in",
        hook_out="mlp.hook_out",
        source="a/file",
    )


@every_copy
def test_weights(copied):
    given = full()
    got = copied(given)
    for field in dataclasses.fields(given):
        assert same_bits(getattr(got, field.name), getattr(given, field.name)), field.name


@every_copy
def test_encoder(copied):
    options = {
        "top_k": None,
        "activation_threshold": 0.25,
        "use_compile": False,
        "chunk_size": 3,
        "screening": "int8",
    }
    given = SparseTranscoderEncoder({3: full(), 5: weights(5, k=4)}, **options)
    got = copied(given)
    assert {name: getattr(got, name) for name in options} == options
    assert got.device_weight_bytes is None and got.layers == [3, 5]
    hidden = normal(20, H)
    for layer in (3, 5):
        assert same_bits(got.encode_layer(layer, hidden), given.encode_layer(layer, hidden))
    features = given.encode_layer(3, hidden)
    assert same_bits(got.decode(3, features, hidden), given.decode(3, features, hidden))


def test_deepcopy_has_its_own_weights_and_copy_shares_them():
    given = SparseTranscoderEncoder({0: weights(0)}, 5, 0.0)
    hidden = normal(4, H)
    deep, shallow = copy.deepcopy(given), copy.copy(given)
    before = given.encode_layer(0, hidden)
    given.__getstate__()["transcoders"][0].W_enc.zero_()
    assert same_bits(deep.encode_layer(0, hidden), before)
    shared = copy.copy(shallow).encode_layer(0, hidden)  # A new engine of the same weights.
    assert not same_bits(shared, before)


def test_mapped_weights(tmp_path):
    """Weights of a memory-mapped file travel without the file."""
    save({2: weights(2, W_dec=normal(H, F))}, tmp_path / "set")
    loaded = load_transcoders(tmp_path / "set", device="cpu")
    pickled = pickle.dumps(loaded)
    (tmp_path / "set" / "layer_2.safetensors").unlink()
    assert same_bits(pickle.loads(pickled)[2].W_enc, weights(2).W_enc)


def test_another_process(tmp_path):
    given = SparseTranscoderEncoder({0: weights(0)}, 5, 0.0)
    hidden = normal(9, H)
    (tmp_path / "encoder").write_bytes(pickle.dumps((given, hidden)))
    code = """
import pickle, sys
from pathlib import Path
encoder, hidden = pickle.loads(Path(sys.argv[1], "encoder").read_bytes())
Path(sys.argv[1], "result").write_bytes(pickle.dumps(encoder.encode_layer(0, hidden)))
"""
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    result = pickle.loads((tmp_path / "result").read_bytes())
    assert same_bits(result, given.encode_layer(0, hidden))
