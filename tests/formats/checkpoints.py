"""Checkpoints written by hand, as each project writes them, and what tests do to them."""

import json
import os
import zipfile

import pytest
import torch
from oracle import integers, normal
from safetensors.torch import load_file, save_file
from sparse_transcoder import SparseTranscoderEncoder, load_transcoders

CIRCUIT_TRACER = "circuit-tracer is not installed: pip install sparse_transcoder[peers]"
HIDDEN = 2 * normal(50, 16, seed=11)
"""Hidden states for the projects' own coders, which take H = 16."""


def load(folder, layers=None):
    return load_transcoders(folder, layers, device="cpu")


def dense(weights, hidden):
    """[N, F]: what the engine keeps, by scattering a result of all features."""
    features = weights.W_enc.shape[0]
    encoder = SparseTranscoderEncoder({weights.layer: weights}, features, 0.0)
    result = encoder.encode_layer(weights.layer, hidden)
    return torch.zeros(hidden.shape[0], features).scatter(
        1, result["indices"], result["activations"]
    )


def relu(pre):
    return pre.clamp(min=0)


def jumprelu(pre, threshold):
    return torch.where(pre > threshold, pre, 0.0).clamp(min=0)


def topk(pre, k):
    order = pre.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(pre).scatter(1, order, pre.gather(1, order)).clamp(min=0)


def ints(*shape, seed):
    """Small whole numbers.

    Every pre-activation is exact, many are equal to a threshold, and results compare bit for bit.
    """
    return integers(*shape, seed=seed)


class Written:
    """What a checkpoint on disk means; ``encode`` is its formula on the stored tensors."""

    def __init__(self, encode, W_enc, W_dec, b_dec, W_skip=None, hooks=("", "")):
        self.encode, self.W_enc, self.W_dec, self.b_dec = encode, W_enc, W_dec, b_dec
        self.W_skip, self.hooks = W_skip, hooks


def put(folder, name, tensors, config_name=None, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".npz"):
        np = numpy()
        np.savez(folder / name, **{key: value.numpy() for key, value in tensors.items()})
    elif name.endswith(".pt"):
        torch.save({"state_dict": tensors} if "transcoder_L" in name else tensors, folder / name)
    else:
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
    if config_name:
        (folder / config_name).write_text(json.dumps(config))
    return folder / name


def numpy():
    return pytest.importorskip("numpy", reason="numpy is not installed")


def stored(path):
    """The tensors of a weights file, by name."""
    if path.suffix == ".npz":
        return {name: torch.from_numpy(array) for name, array in numpy().load(path).items()}
    if path.suffix == ".safetensors":
        return load_file(path)
    content = torch.load(path)
    return content.get("state_dict", content)


def parts(F, H, seed=0, **more):
    """Tensors of the commonest names and shapes."""
    tensors = {
        "W_enc": ints(H, F, seed=seed + 1),
        "b_enc": ints(F, seed=seed + 2),
        "W_dec": ints(F, H, seed=seed + 3),
        "b_dec": ints(H, seed=seed + 4),
    }
    return tensors | more


def changed(path, **changes):
    """Rewrite a weights file with other tensors. None takes a tensor away."""
    tensors = stored(path) | changes
    path.unlink()
    put(path.parent, path.name, {name: t for name, t in tensors.items() if t is not None})


def configured(path, **changes):
    """Rewrite a JSON config with other values."""
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps(values))


def refused(folder, *words):
    """The folder is refused in one line that names it and holds the words."""
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as caught:
        load(folder)
    text = str(caught.value)
    assert str(folder) in text and "\n" not in text and len(text) < 1000
    for word in words:
        assert word in text, text


def weights_file(folder):
    """The first weights file in or below a folder; of a cross-layer transcoder, the encoder's."""
    suffixes = (".npz", ".pt", ".safetensors")
    files = (path for path in sorted(folder.rglob("*")) if path.suffix in suffixes)
    return next(path for path in files if "W_dec_" not in path.name)


class Bomb:
    """A pickle that opens the marker's file where it is loaded unsafely."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def rezipped(path, change, compression=zipfile.ZIP_STORED):
    """Rewrite an archive with each record as change(name, bytes) gives it."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, record in records.items():
            archive.writestr(name, change(name, record))


def close(got, want):
    """Equal within 1e-5, relative above 1."""
    want = want.detach().double()
    return bool(((got.double() - want).abs() <= 1e-5 * want.abs().clamp(min=1)).all())


def randomise(module, seed=0):
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(module.named_parameters())):
            scale = 4 if parameter.ndim > 1 else 2
            value = normal(*parameter.shape, seed=seed + 31 * number) / scale
            parameter.copy_(value.abs() if "threshold" in name else value)
    return module


def check_stays_a_view(folder, write):
    """The decoder is not copied from its file."""
    write(folder, 0, 30, 8)
    weights = load(folder)[0]
    assert weights.W_dec.T.is_contiguous() and not weights.W_dec.is_contiguous()


def check_is_not_waited_for(folder, write, name):
    """A pipe, or a link in a circle, stands in the place of a file."""
    write(folder, 0, 30, 8)
    path = next(folder.rglob(name))
    for put_there in (lambda: os.mkfifo(path), lambda: path.symlink_to(path)):
        path.unlink()
        put_there()
        refused(folder)


def check_k_beyond_64_bits(folder, write, name, k):
    write(folder, 0, 30, 8)
    path = next(folder.rglob("c*f*g.json"))
    configured(path, **{name: k})
    refused(folder, path.name, f"{name} must be at least 1 and fit 64 bits")


def check_spoils_no_terminal(folder):
    """Control characters of a hook name are not printed."""
    with pytest.raises(ValueError, match="hook_in must be printable text, got") as caught:
        load(folder)
    assert str(caught.value).isprintable() and str(folder) in str(caught.value)
