"""Parquet: every entry by feature, strongest first, and tables of features and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..read import Corpus
from .features import Feature
from .merge import Block

BUCKET = 1 << 14
"""Features of a file."""
GROUP = 1 << 17
"""Entries of a row group: what is read for one feature at least."""


class ParquetWriter:
    """layer={l}/bucket-{b}.parquet, features.parquet and tokens.parquet."""

    def __init__(self, corpus: Corpus, folder: Path) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise ImportError(
                "parquet: pyarrow is needed: pip install sparse_transcoder[corpus]"
            ) from None
        self._arrow: Any = pyarrow
        self._parquet: Any = pyarrow.parquet
        self._corpus, self._folder, self._tokens = corpus, folder, corpus.tokens()
        self._rows: list[dict[str, Any]] = []
        self._bucket: tuple[Path, Any] | None = None

    def add_block(self, block: Block) -> None:
        ids = np.repeat(np.arange(len(block.begin) - 1) + block.first, np.diff(block.begin))
        order = np.lexsort((-block.activations, ids))
        windows, places = np.divmod(block.positions[order], self._corpus.ctx)
        columns = {
            "feature": ids[order].astype(np.uint32),
            "sequence": windows.astype(np.uint32),
            "position": places.astype(np.uint16 if self._corpus.ctx <= 1 << 16 else np.uint32),
            "token": self._tokens.reshape(-1)[block.positions[order]].astype(np.uint32),
            "activation": block.activations[order],
        }
        last = block.first + len(block.begin) - 1
        for bucket in range(block.first // BUCKET, (last - 1) // BUCKET + 1):
            inside = slice(*np.searchsorted(ids, (bucket * BUCKET, (bucket + 1) * BUCKET)))
            table = self._arrow.table({name: values[inside] for name, values in columns.items()})
            path = self._folder / f"layer={block.layer}" / f"bucket-{bucket}.parquet"
            if self._bucket is None or self._bucket[0] != path:
                self._close()
                path.parent.mkdir(exist_ok=True)
                writer = self._parquet.ParquetWriter(path, table.schema, compression="zstd")
                self._bucket = path, writer
            self._bucket[1].write_table(table, row_group_size=GROUP)

    def add(self, feature: Feature) -> None:
        self._rows.append(
            {
                "layer": feature.layer,
                "feature": feature.feature,
                "count": feature.count,
                "density": feature.density,
                "max": feature.max,
                "mean": feature.mean,
                "quantiles": feature.quantiles[9::10].tolist(),
                "top_tokens": [self._corpus.word(token) for token, _ in feature.tokens],
            }
        )

    def _close(self) -> None:
        if self._bucket is not None:
            self._bucket[1].close()
            self._bucket = None

    def close(self) -> None:
        self._close()
        if self._rows:
            table = self._arrow.Table.from_pylist(self._rows)
            self._parquet.write_table(table, self._folder / "features.parquet")
        ctx = self._corpus.ctx
        writer = None
        for part in self._corpus:
            count = len(part.tokens)
            ids = part.tokens.reshape(-1)
            sequences = np.repeat(np.arange(count) + part.first_window, ctx)
            table = self._arrow.table(
                {
                    "sequence": sequences.astype(np.uint32),
                    "position": np.tile(np.arange(ctx), count).astype(np.uint32),
                    "token": ids.astype(np.uint32),
                    "text": [self._corpus.word(i) for i in ids.tolist()],
                    "recorded": part.mask.reshape(-1).astype(bool),
                }
            )
            if writer is None:
                path = self._folder / "tokens.parquet"
                writer = self._parquet.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table)
        if writer is not None:
            writer.close()
