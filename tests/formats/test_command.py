"""python -m sparse_transcoder: what it prints, writes and refuses."""

import io
import re
import subprocess
import sys

import pytest
import torch
from checkpoints import close, dense, load, parts, put, relu
from oracle import normal
from sparse_transcoder.__main__ import main
from test_clt import clt
from test_gemma_scope import gemma_scope
from test_sae_lens import sae_lens
from test_sparsify import sparsify, sparsify_sae


def command(*arguments):
    line = [sys.executable, "-m", "sparse_transcoder", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_info(tmp_path):
    for i in (0, 1):
        sparsify_sae(tmp_path, i, 30, 8)
    code, out, err = command("info", tmp_path)
    assert (code, err) == (0, "")
    head, *rows, last = out.splitlines()
    assert head.split() == ["layer", "H", "F", "dtype", "activation", "hooks", "bytes"]
    assert len(rows) == 2 and rows[1].split()[:4] == ["1", "8", "30", "float32"]
    assert "topk k=4, input bias" in rows[1] and "mlp.hook_out" in rows[1]
    assert last.startswith("sparsify: 2 layers")


def test_convert_dtype(tmp_path):
    sae_lens(tmp_path / "a", 1, 30, 8, "jumprelu", centred=True)
    code, out, err = command("convert", tmp_path / "a", tmp_path / "b", "--dtype", "bfloat16")
    assert (code, err) == (0, "") and "folded" in out
    weights = load(tmp_path / "b")[1]
    assert weights.W_enc.dtype == weights.W_dec.dtype == torch.bfloat16
    assert weights.threshold.dtype == weights.b_enc.dtype == torch.float32


def test_convert_tells_that_hooks_are_lost(tmp_path, capsys):
    sparsify(tmp_path / "a", 0, 30, 8)
    sparsify(tmp_path / "a", 1, 30, 8)
    (tmp_path / "a" / "layers.1.mlp").rename(tmp_path / "a" / "layers.1")
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and "different hooks" in err
    assert {weights.hook_in for weights in load(tmp_path / "b").values()} == {""}


def test_a_folded_bias_is_close(tmp_path):
    """Not whole numbers: folding in float64 rounds once."""
    p = {name: value + 0.1 * normal(*value.shape, seed=5) for name, value in parts(30, 8).items()}
    config = {
        "architecture": "standard",
        "apply_b_dec_to_input": True,
        "hook_name": "blocks.0.hook_mlp_in",
    }
    put(tmp_path / "a", "sae_weights.safetensors", p, "cfg.json", config)
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    hidden = normal(40, 8)
    want = relu((hidden - p["b_dec"]).double() @ p["W_enc"].double() + p["b_enc"].double())
    assert close(dense(load(tmp_path / "b")[0], hidden), want)


def reference_with_layer_norm(root, i, F, H):
    state = {"enc.0.weight": torch.ones(H), "enc.0.bias": torch.zeros(H)}
    put(root, f"transcoder_L{i}.pt", state | {"dec.weight": torch.ones(H, F)})


@pytest.mark.parametrize(
    "write, word", [(clt, "many layers"), (reference_with_layer_norm, "LayerNorm")]
)
def test_convert_refuses_what_native_cannot_hold(tmp_path, capsys, write, word):
    write(tmp_path / "a", 0, 30, 8)
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and word in err
    assert [path.name for path in tmp_path.iterdir()] == ["a"], "something half-written is left"


def test_command_errors(tmp_path, capsys):
    """In this process: an exit code of 2 is argparse's SystemExit."""
    sparsify(tmp_path / "a", 0, 30, 8)
    for arguments, expected in (
        (["info", tmp_path / "none"], 1),
        (["info", tmp_path / "a" / "layers.0.mlp" / "cfg.json"], 1),
        (["convert", tmp_path / "a", tmp_path / "a"], 1),
        ([], 2),
        (["info"], 2),
        (["convert", tmp_path / "a", tmp_path / "b", "--dtype", "int8"], 2),
    ):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        assert (code, out) == (expected, ""), arguments
        assert expected == 2 or (err.startswith("error: ") and err.count("\n") == 1)
    reason = f"error: {tmp_path / 'none'}: there is no such folder\n"
    assert command("info", tmp_path / "none") == (1, "", reason)
    assert command("fly")[0] == 2


@pytest.mark.parametrize("of", [(), ("info",), ("convert",)])
def test_help_has_examples(capsys, of):
    with pytest.raises(SystemExit) as ended:
        main([*of, "--help"])
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    assert "examples:" in out and "exit codes" in out
    assert "python -m sparse_transcoder convert" in out


@pytest.mark.parametrize("native", [False, True])
def test_progress_on_a_terminal(tmp_path, monkeypatch, native):
    for i in (0, 1, 4):
        gemma_scope(tmp_path / "source", i, 30, 8)
    source = tmp_path / "source"
    if native:
        assert main(["convert", str(source), str(tmp_path / "native")]) == 0
        source = tmp_path / "native"
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["convert", str(source), str(tmp_path / "target")]) == 0
    bars = re.findall(r"\rconvert \[(#*) *\] (\d)/3 layer (\d)", terminal.getvalue())
    assert bars == [("", "0", "0"), ("#" * 10, "1", "1"), ("#" * 20, "2", "4")]
