"""One self-contained page to look at features."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import written
from ..read import Corpus
from .circuit_tracer import short
from .features import Example, Feature
from .lens import Logits

TOP, PER_INTERVAL, BEFORE, AFTER = 12, 3, 26, 10
"""Contexts of a feature, and tokens around a peak."""
GROUP = 16
"""Features that are packed together; the page unpacks one group at a time."""


def packed(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


class HtmlWriter:
    """explorer.html. The page holds an overview of every feature, and packed groups of what is
    shown of one, each in a script element of its own that the browser does not parse."""

    def __init__(
        self,
        corpus: Corpus,
        folder: Path,
        logits: dict[int, Logits | None],
        labels: Mapping[int, Mapping[int, str]],
    ) -> None:
        self._corpus, self._logits, self._labels = corpus, logits, labels
        self._path = folder / "explorer.html"
        self._groups = open(folder / ".groups", "w", encoding="ascii")
        self._words: dict[int, int] = {}
        self._overview: dict[int, dict[str, list[Any]]] = {}
        self._waiting: list[Any] = []

    def add(self, feature: Feature) -> None:
        layer = self._overview.setdefault(
            feature.layer, {"label": [], "count": [], "max": [], "tokens": []}
        )
        fires_on = [self._word(token) for token, _ in feature.tokens[:5]]
        label = self._labels.get(feature.layer, {}).get(feature.feature, "")
        layer["label"].append(label)
        layer["tokens"].append(fires_on)
        layer["count"].append(feature.count)
        layer["max"].append(short(feature.max))
        self._waiting.append(self._record(feature))
        last = feature.feature + 1 == self._corpus.features(feature.layer)
        if len(self._waiting) == GROUP or last:
            name = f"g{feature.layer}-{feature.feature // GROUP}"
            data = packed(self._waiting)
            self._groups.write(f'<script type="text/plain" id="{name}">{data}</script>\n')
            self._waiting = []

    def _word(self, token: int) -> int:
        return self._words.setdefault(int(token), len(self._words))

    def _record(self, feature: Feature) -> dict[str, Any]:
        lens = self._logits.get(feature.layer)
        i = feature.feature
        found: dict[str, Any] = {
            "mean": short(feature.mean),
            "median": short(feature.quantiles[49]) if len(feature.quantiles) else 0,
            "bars": feature.histogram.tolist(),
            "tokens": [[self._word(t), short(share)] for t, share in feature.tokens],
            "top": self._examples(feature.top, TOP),
            "intervals": [
                [*map(short, (x.lower, x.upper, x.share)), self._examples(x.examples, PER_INTERVAL)]
                for x in feature.intervals
            ],
        }
        if lens is not None:
            for name, ids, values in (
                ("up", lens.top[i], lens.top_values[i]),
                ("down", lens.bottom[i], lens.bottom_values[i]),
            ):
                pairs = zip(ids.tolist(), values.tolist(), strict=True)
                found[name] = [[self._word(t), short(v)] for t, v in pairs if v]
        return found

    def _examples(self, examples: list[Example], count: int) -> list[Any]:
        """The first ones; those that read the same are shown once."""
        found: dict[tuple[int, ...], list[Any]] = {}
        for one in map(self._example, examples):
            found.setdefault(tuple(one[2]), one)
        return list(found.values())[:count]

    def _example(self, example: Example) -> list[Any]:
        """[window, peak - first, words, positions and activations that are not 0]"""
        first = max(0, example.peak - BEFORE)
        tokens = example.tokens[first : example.peak + AFTER + 1]
        values = example.activations[first : example.peak + AFTER + 1]
        on = [[i, short(float(values[i]))] for i in values.nonzero()[0].tolist()]
        words = [self._word(token) for token in tokens.tolist()]
        return [example.window, example.peak - first, words, on]

    def close(self) -> None:
        self._groups.close()
        groups = Path(self._groups.name)
        corpus = self._corpus
        data = {
            "model": Path(corpus.manifest["origin"].get("model", "")).name
            or corpus.manifest["model"]["class"],
            "positions": corpus.summary()["positions"],
            "recorded": corpus.recorded,
            "group": GROUP,
            "words": [corpus.word(token) for token in self._words],
            "layers": [
                {"layer": layer, "hook": corpus.manifest["layers"][str(layer)]["hook"], **columns}
                for layer, columns in self._overview.items()
            ],
        }
        page = (Path(__file__).parent / "explorer.html").read_text(encoding="utf-8")
        before, after = page.replace("{{data}}", packed(data)).split("{{groups}}")
        with written(self._path) as file, open(groups, "rb") as packed_groups:
            file.write(before.encode())
            while chunk := packed_groups.read(1 << 20):
                file.write(chunk)
            file.write(after.encode())
        groups.unlink()
