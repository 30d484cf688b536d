"""Gemma Scope: params.npz."""

import io
import struct
import zipfile

import pytest
import torch
from checkpoints import (
    CIRCUIT_TRACER,
    Bomb,
    Written,
    check_is_not_waited_for,
    dense,
    ints,
    jumprelu,
    load,
    numpy,
    parts,
    put,
    refused,
    relu,
    weights_file,
)
from every_layout import EveryLayout

np = numpy()


def gemma_scope(root, i, F, H):
    p = parts(F, H, i, threshold=ints(F, seed=i + 7))
    put(root / f"layer_{i}" / "width_16k" / "average_l0_5", "params.npz", p)

    def encode(x):
        return jumprelu(x @ p["W_enc"] + p["b_enc"], p["threshold"])

    return Written(encode, p["W_enc"].T, p["W_dec"].T, p["b_dec"])


class TestGemmaScope(EveryLayout):
    WRITERS = (gemma_scope,)


def test_pipes_and_links_in_a_circle_are_not_waited_for(tmp_path):
    check_is_not_waited_for(tmp_path, gemma_scope, "params.npz")


def test_object_arrays_are_refused_and_not_run(tmp_path):
    marker = tmp_path / "ran"
    gemma_scope(tmp_path, 0, 30, 8)
    path = weights_file(tmp_path)
    np.savez(path, W_enc=np.array([Bomb(marker)], dtype=object))
    refused(tmp_path, "params.npz")
    assert not marker.exists()


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 1099511627776), }",
        "(" * 5000,
    ],
)
def test_npz_headers_that_lie(tmp_path, header):
    gemma_scope(tmp_path, 0, 30, 8)
    text = header.encode() + b"\n"
    array = io.BytesIO()
    array.write(b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text)
    with zipfile.ZipFile(weights_file(tmp_path), "w") as archive:
        archive.writestr("W_enc.npy", array.getvalue())
    refused(tmp_path, "params.npz")


def test_npz_that_unpacks_to_much_more(tmp_path):
    gemma_scope(tmp_path, 0, 30, 8)
    with zipfile.ZipFile(weights_file(tmp_path), "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("more.npy", bytes(80 << 20))
    refused(tmp_path, "params.npz", "it unpacks to 838", "expected at most 67")


@pytest.mark.parametrize("F, H", [(64, 16), (16, 16)])
def test_as_circuit_tracer_reads_it(tmp_path, F, H):
    name = "circuit_tracer.transcoder.single_layer_transcoder"
    peer = pytest.importorskip(name, reason=CIRCUIT_TRACER)
    gemma_scope(tmp_path, 3, F, H)
    path = str(weights_file(tmp_path))
    model = peer.load_gemma_scope_transcoder(path, 3, device=torch.device("cpu"))
    hidden = ints(40, H, seed=20)
    # The engine never returns a negative activation, whatever the threshold.
    assert torch.equal(dense(load(tmp_path)[3], hidden), relu(model.encode(hidden)))
