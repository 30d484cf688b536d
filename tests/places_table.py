"""The table of docs/places.md: python tests/places_table.py --write. tests/test_places.py compares
it with what it measures."""

import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs" / "places.md"
REASONS = {
    "a": (
        "the layer adds attention and MLP to the stream at once, so nothing stands between them",
        "at once",
    ),
    "b": (
        "the norm is a LayerNorm, of which two things are called so: name the one meant",
        "is a LayerNorm",
    ),
    "c": ("no norm stands before the MLP: it reads the stream", "has no norm whose output"),
    "d": ("one norm serves attention and MLP", "has one norm for"),
    "e": ("no single module of the layer is its MLP", "has no module that works on each position"),
    "f": (
        "the layer has several modules that work on each position by itself: name one",
        "more than one module",
    ),
    "g": (
        "the layer does more to its output than to add the MLP: a norm, a gate or a scale after "
        "the sum",
        "is not what stands",
    ),
    "h": ("the layer's stream is not [batch, tokens, hidden]", "not hidden states"),
    "i": ("the layer is an MLP alone, so its middle is its start", "adds nothing to the stream"),
    "j": ("the MLP module adds a residual and norms the sum", "adds a residual before"),
    "k": (
        "a layer is given something else than the one before it gives",
        "gives is not what layer",
    ),
    "l": ("the layer runs more than once in a pass of text, or not at all", "times in one pass"),
    "m": ("the norm is neither an RMSNorm nor a LayerNorm", "neither an RMSNorm"),
}


def letter(reason):
    return next(key for key, (_, words) in REASONS.items() if words in reason)


def cell(places):
    """What stands in the table for one place of all layers, each a reason or None."""
    kinds = ["yes" if reason is None else letter(reason) for reason in places]
    if len(set(kinds)) == 1:
        return kinds[0]
    return ", ".join(f"{kind} in {sum(k == kind for k in kinds)}" for kind in dict.fromkeys(kinds))


def row(kind, name, cells):
    return f"| {kind} | {name} | {' | '.join(cells)} |"


def rows_of(text):
    """{family: its row} of the table, and the version of transformers that it is of."""
    table = text[text.index("<!-- table -->") : text.index("<!-- end -->")]
    rows = {
        line.split("|")[1].strip(): line
        for line in table.splitlines()
        if line.startswith("| ") and "`" not in line
    }
    return rows, re.search(r"transformers (\d+\.\d+\.\d+)", table)[1]


def main():
    import torch
    import transformers
    from families import FAMILIES, SKIPPED, made
    from sparse_transcoder.capture import HOOKS
    from test_places import measured

    torch.set_num_threads(1)
    lines = [f"Of transformers {transformers.__version__}:", ""]
    lines += [
        "| family | model | " + " | ".join(f"`{h}`" for h in HOOKS) + " |",
        "|---|---|" + "---|" * len(HOOKS),
    ]
    lines += [measured(kind, made(kind))[0] for kind in FAMILIES if kind not in SKIPPED]
    lines += ["", *(f"- {key}: {text}" for key, (text, _) in REASONS.items()), "", "Not tried: "]
    lines[-1] += "; ".join(f"{kind} ({why})" for kind, why in SKIPPED.items()) + "."
    text = DOCS.read_text(encoding="utf-8")
    start, end = text.index("<!-- table -->") + len("<!-- table -->"), text.index("<!-- end -->")
    new = text[:start] + "\n" + "\n".join(lines) + "\n" + text[end:]
    if "--write" in sys.argv:
        DOCS.write_text(new, encoding="utf-8")
    sys.exit(
        0
        if new == text or "--write" in sys.argv
        else "docs/places.md is old: python tests/places_table.py --write"
    )


if __name__ == "__main__":
    main()
