"""From a corpus to features: encoded once, resumable, by one process or many (docs/corpus.md)."""

from .encode import Run, encode_corpus
from .read import Corpus, Part

__all__ = ["Corpus", "Part", "Run", "encode_corpus"]
