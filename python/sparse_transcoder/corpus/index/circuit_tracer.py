"""circuit-tracer's features_dir (https://github.com/decoderesearch/circuit-tracer):
index.json.gz and layer_{l}.bin."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

from ..read import Corpus
from .features import Example, Feature
from .lens import Logits

CONTEXT = 32
"""Tokens to each side of a peak."""


def short(value: float) -> float:
    return float(f"{value:.4g}")


class CircuitTracerWriter:
    def __init__(self, corpus: Corpus, folder: Path, logits: dict[int, Logits | None]) -> None:
        self._corpus, self._folder, self._logits = corpus, folder, logits
        self._index: dict[str, dict[str, Any]] = {}
        self._file: BinaryIO | None = None

    def add(self, feature: Feature) -> None:
        name = str(feature.layer)
        if name not in self._index:
            self._close()
            self._index[name] = {"filename": f"layer_{name}.bin", "offsets": [0]}
            self._file = open(self._folder / f"layer_{name}.bin", "wb")
        assert self._file is not None
        data = gzip.compress(json.dumps(self.record(feature)).encode(), 6, mtime=0)
        self._file.write(struct.pack("<I", len(data)) + data)
        self._index[name]["offsets"].append(self._file.tell())

    def record(self, feature: Feature) -> dict[str, Any]:
        """A feature as the viewer reads it."""
        word = self._corpus.word
        lens = self._logits.get(feature.layer)
        quantiles = [("Top", feature.top)] if feature.top else []
        for interval in feature.intervals:
            if interval.examples:
                text = f"Interval {interval.lower:.2f} to {interval.upper:.2f}"
                quantiles.append((text, interval.examples))
        return {
            "transcoder_id": self._corpus.manifest["layers"][str(feature.layer)]["hook"],
            "index": feature.feature,
            "examples_quantiles": [
                {"quantile_name": name, "examples": [self._example(one) for one in examples]}
                for name, examples in quantiles
            ],
            "top_logits": [word(i) for i in lens.top[feature.feature]] if lens else [],
            "bottom_logits": [word(i) for i in lens.bottom[feature.feature]] if lens else [],
            "act_min": 0.0,
            "act_max": short(feature.max),
            "quantile_values": [short(value) for value in feature.quantiles],
            "histogram": feature.histogram.tolist(),
            "activation_frequency": feature.density,
        }

    def _example(self, example: Example) -> dict[str, Any]:
        first = max(0, example.peak - CONTEXT)
        inside = slice(first, example.peak + CONTEXT + 1)
        word = self._corpus.word
        return {
            "tokens_acts_list": [short(value) for value in example.activations[inside]],
            "train_token_ind": example.peak - first,
            "is_repeated_datapoint": False,
            "tokens": [word(i) for i in example.tokens[inside]],
        }

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()

    def close(self) -> None:
        self._close()
        data = json.dumps(self._index, separators=(",", ":")).encode()
        (self._folder / "index.json.gz").write_bytes(gzip.compress(data, mtime=0))
