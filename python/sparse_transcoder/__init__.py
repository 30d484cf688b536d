"""Exact, streaming transcoder encoder: hidden states to sparse features, without a dense matrix."""

from importlib.metadata import version as _version
from pathlib import Path

import torch as _torch

from ._torch_version import TORCH_VERSION as _built

if _torch.__version__.split(".")[:2] != _built.split("."):
    raise ImportError(
        f"sparse_transcoder was built against torch {_built} and cannot be used with "
        f"torch {_torch.__version__}: install it again in this environment with "
        "pip install --no-build-isolation"
    )

from . import _C, reference
from .capture import Captured, capture
from .encoder import SparseTranscoderEncoder, encode_single_layer
from .formats import load_transcoders, save_transcoders
from .graph import graph_json
from .weights import TranscoderWeights

__version__ = _version("sparse_transcoder")
__all__ = [
    "Captured",
    "SparseTranscoderEncoder",
    "TranscoderWeights",
    "capture",
    "cmake_prefix_path",
    "encode_single_layer",
    "graph_json",
    "load_transcoders",
    "reference",
    "save_transcoders",
]

cmake_prefix_path = str(Path(_C.__file__).resolve().parent)
"""Folder for CMAKE_PREFIX_PATH, in which ``find_package(sparse_transcoder CONFIG)`` finds the C++
library."""
