"""Neuronpedia's export (https://github.com/hijohnnylin/neuronpedia), as SAEDashboard writes it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..files import Array
from ..read import Corpus
from .circuit_tracer import short
from .features import Example, Feature
from .lens import Directions, Logits

BATCH = 512
"""Features of a file."""
SET = "transcoder"


class NeuronpediaWriter:
    """{model}/{layer}-{set}/ with features/ and activations/ in batches.

    Args:
        logits: {layer: its logits, or None}.
        directions: those of a layer that has logits.
        norms: {layer: [F]}, what values are multiplied with, where they are to be in units of what
            the decoder writes; Neuronpedia's pages of scaled coders are.
    """

    def __init__(
        self,
        corpus: Corpus,
        folder: Path,
        logits: dict[int, Logits | None],
        directions: Callable[[int], Directions],
        norms: dict[int, Array],
    ) -> None:
        self._corpus, self._folder, self._logits = corpus, folder, logits
        self._directions, self._norms = directions, norms
        self._of_layer: tuple[int, Directions] | None = None
        self._model = Path(corpus.manifest["origin"].get("model", "model")).stem.lower()
        self._waiting: list[Feature] = []

    def add(self, feature: Feature) -> None:
        if self._waiting and (
            self._waiting[0].layer != feature.layer or len(self._waiting) == BATCH
        ):
            self._write()
        self._waiting.append(feature)

    def close(self) -> None:
        if self._waiting:
            self._write()

    def _write(self) -> None:
        layer, first = self._waiting[0].layer, self._waiting[0].feature
        source = f"{layer}-{SET}"
        folder = self._folder / self._model / source
        if first == 0:
            self._write_sets(folder, source)
        features = [self._feature(feature, source) for feature in self._waiting]
        if self._logits.get(layer) is not None:
            self._add_directions(features, layer, first)
        activations = [
            line for feature in self._waiting for line in self._activations(feature, source)
        ]
        for name, lines in (("features", features), ("activations", activations)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            data = gzip.compress(text.encode(), 6, mtime=0)
            (folder / name / f"batch-{first // BATCH}.jsonl.gz").write_bytes(data)
        self._waiting = []

    def _write_sets(self, folder: Path, source: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        names = {"modelId": self._model, "sourceSetName": SET, "releaseName": self._model}
        records: dict[str, dict[str, Any]] = {
            "release": {"name": self._model, "description": "", "isNewUi": True},
            "model": {
                "id": self._model,
                "displayName": self._model,
                "layers": len(self._corpus.layers),
            },
            "sourceset": {"modelId": self._model, "name": SET, "hasDashboards": True},
            "source": {"id": source, "setName": SET, "hasDashboards": True, **names},
        }
        for name, record in records.items():
            (folder / f"{name}.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")

    def _add_directions(self, features: list[dict[str, Any]], layer: int, first: int) -> None:
        if self._of_layer is None or self._of_layer[0] != layer:
            self._of_layer = layer, self._directions(layer)
        directions, last = self._of_layer[1], first + len(features)
        for feature, (heights, middles), (indices, cosines) in zip(
            features,
            directions.histograms(first, last),
            directions.nearest(first, last),
            strict=True,
        ):
            feature |= {
                "logits_hist_data_bar_heights": heights,
                "logits_hist_data_bar_values": [short(value) for value in middles],
                "topkCosSimIndices": indices,
                "topkCosSimValues": [short(value) for value in cosines],
            }

    def _scale(self, feature: Feature) -> float:
        norms = self._norms.get(feature.layer)
        return 1.0 if norms is None else float(norms[feature.feature])

    def _feature(self, feature: Feature, source: str) -> dict[str, Any]:
        word, scale = self._corpus.word, self._scale(feature)
        lens, bins = self._logits.get(feature.layer), len(feature.histogram)
        edges = np.linspace(0, feature.max * scale, bins + 1) if bins else np.zeros(1)
        found: dict[str, Any] = {
            "modelId": self._model,
            "layer": source,
            "index": str(feature.feature),
            "maxActApprox": feature.max * scale,
            "hasVector": False,
            "vector": [],
            "hookName": self._corpus.manifest["layers"][str(feature.layer)]["hook"],
            "frac_nonzero": feature.density,
            "freq_hist_data_bar_heights": feature.histogram.tolist(),
            "freq_hist_data_bar_values": [short(value) for value in (edges[:-1] + edges[1:]) / 2],
            "pos_str": [],
            "pos_values": [],
            "neg_str": [],
            "neg_values": [],
            "logits_hist_data_bar_heights": [],
            "logits_hist_data_bar_values": [],
            "topkCosSimIndices": [],
            "topkCosSimValues": [],
        }
        if lens is not None:
            i = feature.feature
            found |= {
                "pos_str": [word(token) for token in lens.top[i]],
                "pos_values": [short(value) for value in lens.top_values[i]],
                "neg_str": [word(token) for token in lens.bottom[i]],
                "neg_values": [short(value) for value in lens.bottom_values[i]],
            }
        return found

    def _activations(self, feature: Feature, source: str) -> list[dict[str, Any]]:
        found = [self._activation(feature, source, one, None) for one in feature.top]
        for interval in feature.intervals:
            bounds = interval.lower, interval.upper, interval.share
            found += [self._activation(feature, source, one, bounds) for one in interval.examples]
        return found

    def _activation(
        self,
        feature: Feature,
        source: str,
        example: Example,
        bounds: tuple[float, float, float] | None,
    ) -> dict[str, Any]:
        word, scale = self._corpus.word, self._scale(feature)
        values = example.activations * scale
        lower, upper, share = bounds or (-1.0, -1.0, -1.0)
        return {
            "modelId": self._model,
            "layer": source,
            "index": str(feature.feature),
            "tokens": [word(token) for token in example.tokens],
            "values": [short(value) for value in values],
            "maxValue": float(values.max()),
            "maxValueTokenIndex": int(values.argmax()),
            "minValue": float(values.min()),
            "binMin": lower * scale if bounds else -1,
            "binMax": upper * scale if bounds else -1,
            "binContains": share,
            "qualifyingTokenIndex": example.peak,
        }
