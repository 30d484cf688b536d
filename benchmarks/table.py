"""Print what README.md and docs/screening.md say in numbers, from the benchmark's results; --write puts it there.

python benchmarks/table.py [--write] [RESULTS]
"""

import argparse
import itertools
import json
import re
import textwrap
from pathlib import Path

from inputs import ACTIVE, KINDS
from plot import draw

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
CROSSOVERS = ROOT / "benchmarks" / "results" / "crossovers.json"
README, DOCS, PLOT = ROOT / "README.md", ROOT / "docs" / "screening.md", ROOT / "docs" / "speed.svg"
OURS = "sparse_transcoder"
BASELINES = [
    "reference fp32",
    "product fp32",
    "reference bf16",
    "linear+topk bf16",
    "product bf16",
    "sparsify",
    "circuit-tracer",
]
MIB = 1 << 20


def markdown(titles, lines):
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [titles, ["---"] * len(titles), *lines])


def median(record, name=OURS):
    return record["contenders"][name]["ms"]["median"]


def number(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def speeds(results):
    """How many times faster than each baseline: its median over ours, of one run."""
    lines = []
    for record in results["cases"]:
        if record["brief"]:
            continue
        ours = median(record)
        ratios = [number(median(record, name) / ours) if name in record["contenders"] else "" for name in BASELINES]
        lines.append([record["case"], number(ours), *ratios])
    return markdown(["case", "ours, ms", *BASELINES], lines)


def survivors(results):
    """What each stage lets through, a row."""
    lines = []
    for record in results["cases"]:
        of = record["explain"]
        if record["brief"] or not of["pairs_int8"]:
            continue
        pairs = of["pairs_int8"] + of["pairs_int16"] + of["pairs_float32"]
        let_through = of["survivors"] / of["pairs_int8"] * of["features"]
        counts = [record["active_per_row"], let_through, of["rescored"] / of["rows"], of["ambiguous"] / of["rows"]]
        cells = [number(count) for count in counts]
        lines.append([record["case"], cells[0], f"{of['pairs_int8'] / pairs:.0%}", *cells[1:]])
    return markdown(["case", "active", "screened in int8", "survive int8", "computed exactly", "ambiguous"], lines)


def screens(results):
    """The time of each screen, in ms."""
    others = ["int8", "int16", "off"]
    lines = []
    for record in results["cases"]:
        if record["screens"]:
            times = [median(record), *(median(record, f"screening {name}") for name in others)]
            lines.append([record["case"], *map(number, times)])
    return markdown(["case", '"auto", ms', *(f'"{name}"' for name in others)], lines)


def phases(results):
    """Where the time goes: shares of the workers' time."""
    names = ["prepare", "screen", "refine", "rescore", "finish"]
    lines = []
    for record in results["cases"]:
        if not record["brief"]:
            ms = [record["explain"][f"{name}_ms"] for name in names]
            rate = str(record.get("int8_gops", ""))
            lines.append([record["case"], *(f"{one / sum(ms):.0%}" for one in ms), rate])
    return markdown(["case", *names, "int8 screen, GOP/s"], lines)


def grid(title, records, row, column, ratio, columns):
    """Ratios of times, one line for each name that row(record) gives, in order of appearance."""
    lines = {}
    for record in records:
        lines.setdefault(row(record), {})[column(record)] = ratio(record["ms"])
    cells = [[name, *(number(of[c]) if c in of else "" for c in columns)] for name, of in lines.items()]
    return markdown([title, *columns], cells)


def shares(crossovers):
    """int8 over the dense screen, by the share of pairs that survives int8; and where they are equal."""
    records = crossovers["dense"]

    def name(record):
        return f"{record['cpu']}, {record['weights']} weights, {record['dense']}"

    def share(record):
        return f"{record['survive']:.0%}"

    columns = list(dict.fromkeys(map(share, records)))
    table = grid("int8 over the dense screen", records, name, share, lambda ms: ms["int8"] / ms["dense"], columns)
    lines = table.split("\n")
    for i, line in enumerate(lines):
        of = [r for r in records if line.startswith(f"| {name(r)} |")]
        lines[i] += f" {equal_at(of):.0%} |" if of else " equal at |" if i == 0 else " --- |"
    return "\n".join(lines)


def equal_at(records):
    """The share at which a straight line between two of the records has both times equal."""
    points = [(r["survive"], r["ms"]["int8"] / r["ms"]["dense"]) for r in sorted(records, key=lambda r: r["survive"])]
    for (low, before), (high, after) in itertools.pairwise(points):
        if before <= 1 < after:
            return low + (high - low) * (1 - before) / (after - before)
    return 0.0 if points[0][1] > 1 else 1.0


def by_rows(crossovers, part, title, over, under):
    records = crossovers[part]
    columns = [str(T) for T in sorted({r["T"] for r in records})]
    return grid(
        title,
        records,
        lambda r: f"{r['cpu']}, {r['kind']}",
        lambda r: str(r["T"]),
        lambda ms: ms[over] / ms[under],
        columns,
    )


def planes(crossovers):
    return by_rows(crossovers, "planes", "two planes over one, rows:", "2", "1")


def rows(crossovers):
    return by_rows(crossovers, "rows", "int8 over float32, rows:", "int8", "float32")


def adverse(crossovers):
    lines = [
        [r["case"], number(r["ms"]["auto"]), number(r["ms"]["off"]), number(r["ms"]["auto"] / r["ms"]["off"])]
        for r in crossovers["adverse"]
    ]
    return markdown(["rows or weights", '"auto", ms', '"off", ms', "auto over off"], lines)


def find(results, **fields):
    """The first case with these fields, or None."""
    return next((r for r in results["cases"] if all(r[key] == value for key, value in fields.items())), None)


def measured(results):
    """README's section: from its title to the next."""
    machine, first = results["machine"], results["cases"][0]
    dense = find(results, kind="dense")["active_per_row"]
    versions = [f"{name} {machine[name]}" for name in ("torch", "eai-sparsify", "circuit-tracer") if name in machine]
    decode = max((r for r in results["cases"] if r["T"] == 1), key=lambda r: (r["dtype"] == "float32", r["layers"]))
    int8 = max(r.get("int8_gops", 0) for r in results["cases"])
    copies = first["memory"]["screening_bytes"] / (first["F"] * first["H"] * first["layers"])
    long = max(results["cases"], key=lambda r: r["T"])
    extra = {name: (long["contenders"][name]["extra_bytes"] or 0) / MIB for name in (OURS, "reference fp32")}
    before = [
        "Times faster than each baseline in the same run: the other's median over ours, results checked for equality first.",
        f"float32 weights and rows, top_k {first['top_k']} (real: 32), {ACTIVE} active features a row (dense: {dense:.0f}),",
        'unless it says otherwise. "Product" is the bare `h @ W.T`, which finds no feature; bf16 baselines multiply bfloat16',
        "copies and are not exact. T x H x F:",
    ]
    after = [
        f"From `benchmarks/results/cpu.json`, which `make bench` makes: {machine['cpu']}, {machine['cores']} cores,",
        f"{' '.join(machine['flags'])}; {', '.join(versions)}. There torch's own products reach",
        f"{machine['product_fp32_gflops']:.0f} GFLOP/s in float32 and {machine['product_bf16_gflops']:.0f} in bfloat16, the int8",
        f"screen {int8} GOP/s; at one row a layer the int8 weights are read at {decode['int8_gb_per_s']} of",
        f"{machine['read_gb_per_s']} GB/s. Ratios carry over to machines of its kind, times do not. An encoder of",
        f"{first['F']} x {first['H']} is built in {first['build_s']:.2f} s; its copies take {copies:.1f} bytes a weight.",
        f"The call on {long['T']:,} rows x {long['F']:,} features needs {extra[OURS]:.0f} MiB beyond weights, copies, input and",
        f"result, the reference pipeline in chunks {extra['reference fp32']:.0f} MiB. [docs/screening.md](docs/screening.md)",
        "derives why the results are exact and shows where the time goes.",
    ]
    paragraphs = [fill(before), speeds(results), "![Times faster over the number of rows](docs/speed.svg)", fill(after)]
    return "\n\n".join(["## Measured", *paragraphs, ""])


def fill(parts):
    return textwrap.fill(" ".join(parts), 130, break_long_words=False, break_on_hyphens=False)


def written(results, crossovers):
    """{path: its text with the results' numbers}"""
    readme = re.sub(r"(?ms)^## Measured\n.*?(?=^## )", lambda _: measured(results), README.read_text())
    docs = DOCS.read_text()
    tables = [survivors(results), screens(results), phases(results)]
    for made in [*tables, *(table(crossovers) for table in (shares, planes, rows, adverse))]:
        title = re.escape(made.split("\n", 1)[0])
        docs, found = re.subn(rf"(?m)^{title}\n(\|.*\n?)+", lambda _, made=made: made + "\n", docs)
        if found != 1:
            raise SystemExit(f"{DOCS.name} must have one table that begins with {made.splitlines()[0]}")
    return {README: readme, DOCS: docs, PLOT: draw(results)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="into README.md and docs/, with the plot")
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = json.loads(options.results.read_text())
    if options.write:
        for path, text in written(results, json.loads(CROSSOVERS.read_text())).items():
            path.write_text(text)
        return
    print("\n\n".join([measured(results), survivors(results), screens(results), phases(results)]))
    print("\n" + "\n".join(f"{kind}: {what}" for kind, what in KINDS.items()))


if __name__ == "__main__":
    main()
