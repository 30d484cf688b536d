"""What every layout must pass. The test file of a layout has a class that inherits these checks."""

import re

import pytest
import torch
from checkpoints import (
    changed,
    configured,
    dense,
    ints,
    load,
    refused,
    stored,
    weights_file,
)
from oracle import normal, same_bits
from sparse_transcoder import SparseTranscoderEncoder, save_transcoders
from sparse_transcoder.__main__ import main

FIELDS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "k", "W_skip", "hook_in", "hook_out")


class EveryLayout:
    """Checks of a layout whose WRITERS write it: (folder, layer, F, H) -> Written."""

    WRITERS = ()
    NATIVE_CAN_HOLD = True
    """Whether the command converts the layout to the native one."""

    @pytest.mark.parametrize("F, H", [(30, 8), (12, 12)])  # F == H must not be guessed from shapes.
    def test_by_hand(self, tmp_path, write, F, H):
        written = {i: write(tmp_path, i, F, H) for i in (0, 1)}
        hidden = ints(40, H, seed=20)
        loaded = load(tmp_path)
        assert list(loaded) == [0, 1]
        for i, weights in loaded.items():
            want = written[i]
            assert weights.layer == i and weights.source.startswith(str(tmp_path))
            assert torch.equal(weights.W_enc, want.W_enc) and weights.W_enc.is_contiguous()
            assert torch.equal(weights.W_dec, want.W_dec)
            assert want.b_dec is None or torch.equal(weights.b_dec, want.b_dec)
            assert same_bits(weights.W_skip, want.W_skip)
            assert (weights.hook_in, weights.hook_out) == want.hooks
            got, right = dense(weights, hidden), want.encode(hidden)
            different = int((got != right).sum())
            assert not different, f"{different} of {right.numel()} activations differ"
            assert 0.02 < (right > 0).double().mean() < 0.9  # Neither nothing nor everything.

    def test_some_layers_are_read_and_no_other(self, tmp_path, write):
        written = {i: write(tmp_path, i, 30, 8) for i in (0, 1)}
        for path in tmp_path.rglob("*"):
            name = str(path.relative_to(tmp_path))
            of_layer_0 = re.search(r"(layer_|layers\.|folder_|L|W_enc_|W_dec_)0(?!\d)", name)
            if of_layer_0 and path.suffix in (".npz", ".pt", ".safetensors"):
                path.write_bytes(b"no weights")
        loaded = load(tmp_path, [1])
        assert list(loaded) == [1] and torch.equal(loaded[1].W_enc, written[1].W_enc)
        with pytest.raises(ValueError, match=str(tmp_path)):
            load(tmp_path, [0])

    def test_a_layer_that_is_not_there(self, tmp_path, write):
        write(tmp_path, 1, 30, 8)
        with pytest.raises(FileNotFoundError, match="layer 5") as caught:
            load(tmp_path, [5])
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)

    def test_a_download_cache(self, tmp_path, write):
        """Files are links to blobs of other names, and the folder holds a link in a circle."""
        want = write(tmp_path / "plain", 1, 30, 8)
        snapshot = tmp_path / "cache" / "snapshots" / "abc"
        (tmp_path / "cache" / "blobs").mkdir(parents=True)
        for number, path in enumerate(sorted((tmp_path / "plain").rglob("*"))):
            target = snapshot / path.relative_to(tmp_path / "plain")
            if path.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            else:
                blob = tmp_path / "cache" / "blobs" / f"{number:064x}"
                path.rename(blob)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(blob)
        (snapshot / "circle").symlink_to(snapshot)
        (snapshot / "nowhere").symlink_to(snapshot / "nowhere")
        assert torch.equal(load(snapshot)[1].W_enc, want.W_enc)

    @pytest.mark.parametrize(
        "change",
        [
            "cut",
            "empty",
            "missing",
            "strange",
            "shape",
            "dimensions",
            "nan",
            "integers",
            "folder",
        ],
    )
    def test_broken_weights(self, tmp_path, write, change):
        write(tmp_path, 0, 30, 8)
        path = weights_file(tmp_path)
        tensors = stored(path)
        encoder = [name for name in tensors if re.search("enc|_E", name)]
        bias = next(name for name in encoder if tensors[name].ndim == 1)
        matrix = next(name for name in encoder if tensors[name].ndim == 2)
        words = [path.name]
        if change == "cut":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif change == "empty":
            path.write_bytes(b"")
        elif change == "folder":
            path.unlink()
            path.mkdir()
        elif change == "missing":
            changed(path, **{bias: None})
            words.append(bias)
        elif change == "strange":
            changed(path, gate=torch.ones(30))
            words.append("gate")
        elif change == "shape":
            changed(path, **{bias: torch.zeros(31)})
            words.append("b_enc")
        elif change == "dimensions":
            changed(path, **{bias: torch.zeros(30, 1)})
            words.append(bias)
        elif change == "integers":
            changed(path, **{matrix: tensors[matrix].long()})
            words.append(matrix)
        elif change == "nan":
            broken = tensors[matrix].clone()
            broken[3, 2] = torch.nan
            changed(path, **{matrix: broken})
            words.append("NaN")
        refused(tmp_path, *words)

    def test_saving_gives_back_every_field(self, tmp_path, write):
        """In the native layout; what it cannot hold is refused and nothing is left behind."""
        write(tmp_path / "source", 1, 30, 8)
        before = load(tmp_path / "source")[1]
        hidden = normal(40, 8)
        if before.input_bias is not None or not self.NATIVE_CAN_HOLD:
            with pytest.raises(ValueError, match=r"layer 1 .*the native layout cannot hold"):
                save_transcoders({1: before}, tmp_path / "target")
            assert [path.name for path in tmp_path.iterdir()] == ["source"]
            return
        save_transcoders({1: before}, tmp_path / "target")
        after = load(tmp_path / "target")[1]
        for name in FIELDS:
            assert same_bits(getattr(after, name), getattr(before, name)), name
        got, want = (
            SparseTranscoderEncoder({1: weights}, 10, 0.0).encode_layer(1, hidden)
            for weights in (after, before)
        )
        assert same_bits(got, want) and want["activations"].any()

    def test_convert_gives_what_the_source_gives(self, tmp_path, write):
        source, target = tmp_path / "source", tmp_path / "native"
        want = write(source, 1, 30, 8)
        assert main(["convert", str(source), str(target)]) == (0 if self.NATIVE_CAN_HOLD else 1)
        if not self.NATIVE_CAN_HOLD:
            assert not target.exists()
            return
        names = sorted(path.name for path in target.iterdir())
        assert names == ["config.yaml", "layer_1.safetensors"]
        before, after = load(source)[1], load(target)[1]
        hidden = ints(40, 8, seed=20)
        assert torch.equal(dense(after, hidden), want.encode(hidden))
        assert after.input_bias is None
        for name in FIELDS:
            if name != "b_enc" or before.input_bias is None:
                assert same_bits(getattr(after, name), getattr(before, name)), name


class WithConfig:
    """Checks of a layout with a JSON config."""

    CONFIG = ""
    """The name of the config."""
    UNSUPPORTED = ()
    """(writer, changes of its config, words of the error) of each variant that is refused."""

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "[]",
            "3",
            "[" * 100_000,
            "\xff\xfe",
            '{"architecture": 3, "k": "4", "act_fn": []',
        ],
    )
    def test_broken_configs(self, tmp_path, text):
        self.WRITERS[0](tmp_path, 0, 30, 8)
        path = next(tmp_path.rglob(self.CONFIG))
        path.write_bytes(text.encode("latin-1"))
        refused(tmp_path, self.CONFIG)

    def test_variants_that_are_not_supported_are_named(self, tmp_path, variant):
        write, changes, words = variant
        write(tmp_path, 0, 30, 8)
        configured(next(tmp_path.rglob(self.CONFIG)), **changes)
        refused(tmp_path, *words)
