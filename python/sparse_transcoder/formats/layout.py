"""What a checkpoint layout is: how its files are recognised, and how one layer is read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from ..weights import TranscoderWeights
from .files import Loading, pickled_names, read_pickled

Recogniser = Callable[[Path, frozenset[str]], list[Path]]
"""(folder, names of its entries) -> the weights files of a layout that lie in that very folder."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A checkpoint layout with one weights file per layer, and perhaps other files beside it."""

    name: str
    """The name that messages use."""
    recognises: Recogniser
    """Finds its weights files in one folder."""
    layer_of: Callable[[Path], int | None]
    """The layer that a weights file declares. None where only the name of a folder can tell it."""
    load: Callable[[int, Path, Loading], TranscoderWeights]
    """Reads one layer from its weights file."""


def one_file(weights: str, config: str | None = None) -> Recogniser:
    """Recognises the folder of one layer by its weights file and the config beside it."""
    needed = {weights} if config is None else {weights, config}
    return lambda folder, names: [folder / weights] if needed <= names else []


def numbered_files(pattern: re.Pattern[str]) -> Recogniser:
    """Recognises a folder whose files carry the number of their layer, the pattern's group 1."""
    return lambda folder, names: [folder / name for name in names if pattern.fullmatch(name)]


def files_with(pattern: re.Pattern[str], *tensors: str) -> Recogniser:
    """Recognises files of torch.save by their names and by the tensors in them.

    One that cannot be read counts too, where no other file speaks against it: what is wrong with it
    is told where it is loaded.
    """

    def recognises(folder: Path, names: frozenset[str]) -> list[Path]:
        there = {name: pickled_names(folder / name) for name in names if pattern.fullmatch(name)}
        fits = {name for name, held in there.items() if held.issuperset(tensors)}
        broken = {name for name, held in there.items() if not held}
        return [folder / name for name in fits | broken] if fits or broken == set(there) else []

    return recognises


def number_in(pattern: re.Pattern[str]) -> Callable[[Path], int | None]:
    """The layer of a numbered file."""

    def layer_of(path: Path) -> int | None:
        found = pattern.fullmatch(path.name)
        return int(found[1]) if found else None

    return layer_of


def not_declared(path: Path) -> None:
    """For layouts whose files do not say their layer."""


def load_linears(encoder: str, decoder: str) -> Callable[[int, Path, Loading], TranscoderWeights]:
    """Reads two torch.nn.Linear of these names: a coder of the residual stream, relu."""

    def load(layer: int, path: Path, loading: Loading) -> TranscoderWeights:
        tensors = read_pickled(path)
        W_enc, b_enc = tensors.take(f"{encoder}.weight", 2), tensors.take(f"{encoder}.bias", 1)
        W_dec, b_dec = tensors.take(f"{decoder}.weight", 2), tensors.take(f"{decoder}.bias", 1)
        tensors.finish()
        return loading.weights(
            layer,
            path,
            W_enc,
            b_enc=b_enc,
            W_dec=W_dec,
            b_dec=b_dec,
            hook_in="hook_resid_post",
            hook_out="hook_resid_post",
        )

    return load
