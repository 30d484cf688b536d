"""Exact, streaming transcoder encoder: hidden states to sparse features, without a dense matrix."""

from importlib.metadata import version as _version
from pathlib import Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

import torch as _torch

# The package holds a folder for each minor version of torch that it was built against, with _C and
# the C++ library in it.
_builds = {path.name[6:]: path for folder in __path__ for path in Path(folder).glob("torch-*")}
_minor = ".".join(_torch.__version__.split(".")[:2])
if _minor not in _builds:
    raise ImportError(
        f"sparse_transcoder was built against torch {' and '.join(sorted(_builds))} "
        f"and cannot be used with torch {_torch.__version__}: install it again in this environment"
    )
__path__.append(str(_builds[_minor]))

from . import _C, reference
from ._C import cpu_instruction_set
from .capture import Captured, capture
from .encoder import SparseTranscoderEncoder, encode_single_layer
from .formats import load_transcoders, save_transcoders
from .graph import graph_json
from .weights import TranscoderWeights

if _TYPE_CHECKING:
    from .corpus import Corpus, encode_corpus

__version__ = _version("sparse_transcoder")
__all__ = [
    "Captured",
    "Corpus",
    "SparseTranscoderEncoder",
    "TranscoderWeights",
    "capture",
    "cmake_prefix_path",
    "cpu_instruction_set",
    "cuda_kernels",
    "encode_corpus",
    "encode_single_layer",
    "graph_json",
    "load_transcoders",
    "reference",
    "save_transcoders",
]


def __getattr__(name: str) -> _Any:
    """Corpora need numpy, which nothing else does."""
    if name not in ("Corpus", "encode_corpus"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import corpus

    return getattr(corpus, name)


cmake_prefix_path = str(Path(_C.__file__).resolve().parent)
"""Folder for CMAKE_PREFIX_PATH, in which ``find_package(sparse_transcoder CONFIG)`` finds the C++
library."""

cuda_kernels: bool = _C.cuda_kernels()
"""Whether this build encodes on CUDA, too; without kernels it encodes on the CPU alone."""
