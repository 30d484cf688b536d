"""Exact, streaming transcoder encoder: hidden states to sparse features, without the dense [tokens, features] matrix."""

from pathlib import Path

import torch as _torch

from ._torch_version import TORCH_VERSION as _built

if _torch.__version__.split(".")[:2] != _built.split("."):
    raise ImportError(
        f"sparse_transcoder was built against torch {_built} and cannot be used with torch {_torch.__version__}: "
        "install it again in this environment with pip install --no-build-isolation"
    )

from . import _C, reference
from ._C import cpu_instruction_set
from .capture import Captured, capture
from .encoder import SparseTranscoderEncoder, encode_single_layer
from .formats import load_transcoders
from .graph import graph_json
from .weights import TranscoderWeights

__version__ = "0.1.0"
__all__ = [
    "Captured",
    "SparseTranscoderEncoder",
    "TranscoderWeights",
    "capture",
    "cmake_prefix_path",
    "cpu_instruction_set",
    "encode_single_layer",
    "graph_json",
    "load_transcoders",
    "reference",
]

cmake_prefix_path = str(Path(_C.__file__).resolve().parent)
"""Folder for CMAKE_PREFIX_PATH, so that ``find_package(sparse_transcoder CONFIG)`` finds the C++ library."""
