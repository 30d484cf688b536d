"""qresearch's SAEs of DeepSeek-R1's residual stream: one file with l{i} in its name, relu.

The layout is that of https://huggingface.co/qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19.
"""

from __future__ import annotations

import re

from .layout import Layout, files_with, load_linears, number_in

FILE = re.compile(r"(?:.*[-_.])?l(\d{1,9})(?:[-_.].*)?\.pth?")


LAYOUT = Layout(
    "DeepSeek-R1 SAE",
    files_with(FILE, "encoder.weight", "decoder.weight"),
    number_in(FILE),
    load_linears("encoder", "decoder"),
)
