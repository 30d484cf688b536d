"""Goodfire's SAEs of the residual stream: one file that ends in -l{i}.pt or -l{i}.pth, relu.

The layout is that of https://huggingface.co/Goodfire/Llama-3.1-8B-Instruct-SAE-l19.
"""

from __future__ import annotations

import re

from .layout import Layout, files_with, load_linears, number_in

FILE = re.compile(r"(?:.*[-_.])?l(\d{1,9})\.pth?")


LAYOUT = Layout(
    "Goodfire",
    files_with(FILE, "encoder_linear.weight", "decoder_linear.weight"),
    number_in(FILE),
    load_linears("encoder_linear", "decoder_linear"),
)
