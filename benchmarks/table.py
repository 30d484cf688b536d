"""Write the benchmarks' numbers into the documents: every table there is made here, no sentence is.

    python benchmarks/table.py          # prints the tables
    python benchmarks/table.py --write  # puts them into README.md and docs/

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. Its numbers come from
benchmarks/results.
"""

import argparse
import itertools
import json
import re
from pathlib import Path

from plot import draw, draw_memory

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("performance", "corpus", "server")),
]
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
GPU_BASELINES = ["product bf16", "linear+topk bf16", "reference bf16", "reference fp32"]
WAYS = ["circuit-tracer", "on the engine"]
MIB = 1 << 20
# README's rows: (case, what a reader calls it).
SHORT = {
    "256 x 2048 x 16384 planted": "256 tokens, 16,384 features",
    "1 x 5120 x 40960 planted": "1 token, 40,960 features",
    "23 layers: 8 x 2048 x 16384 planted": "8 tokens, 23 layers of 16,384 features",
    "2 layers: 8192 x 576 x 2304 real": "8,192 tokens of a real model, 2 layers of 2,304",
}


def markdown(titles, lines):
    return "\n".join(
        "| " + " | ".join(cells) + " |" for cells in [titles, ["---"] * len(titles), *lines]
    )


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
        ratios = [
            number(median(record, name) / ours) if name in record["contenders"] else ""
            for name in BASELINES
        ]
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
        counts = [
            record["active_per_row"],
            let_through,
            of["computed"] / of["rows"],
            of["ambiguous"] / of["rows"],
        ]
        cells = [number(count) for count in counts]
        lines.append([record["case"], cells[0], f"{of['pairs_int8'] / pairs:.0%}", *cells[1:]])
    return markdown(
        ["case", "active", "screened in int8", "survive int8", "computed exactly", "ambiguous"],
        lines,
    )


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
    """Where the time goes: shares of the workers' time, and of the instructions' peaks."""
    names = ["prepare", "screen", "rescreen", "compute", "finish"]
    peaks = {
        "screen": "screen, of its peak",
        "screen_loop": "screen, of its loop",
        "rescreen": "rescreen, of its peak",
        "compute": "compute, of its peak",
    }
    lines = []
    for record in results["cases"]:
        if not record["brief"]:
            ms = [record["explain"][f"{name}_ms"] for name in names]
            of = record.get("share_of_peak", {})
            cells = [f"{of[name]:.0%}" if name in of else "" for name in peaks]
            lines.append([record["case"], *(f"{one / sum(ms):.0%}" for one in ms), *cells])
    return markdown(["case", *names, *peaks.values()], lines)


def grid(title, records, row, column, ratio, columns):
    """Ratios of times, one line for each name that row(record) gives, in order of appearance."""
    lines = {}
    for record in records:
        lines.setdefault(row(record), {})[column(record)] = ratio(record["ms"])
    cells = [
        [name, *(number(of[c]) if c in of else "" for c in columns)] for name, of in lines.items()
    ]
    return markdown([title, *columns], cells)


def shares(crossovers):
    """int8 over the dense screen, by the share of pairs that survives, and where they are equal."""
    records = crossovers["dense"]

    def name(record):
        return f"{record['cpu']}, {record['weights']} weights, {record['dense']}"

    def share(record):
        return f"{record['survive']:.0%}"

    columns = list(dict.fromkeys(map(share, records)))
    table = grid(
        "int8 over the dense screen",
        records,
        name,
        share,
        lambda ms: ms["int8"] / ms["dense"],
        columns,
    )
    lines = table.split("\n")
    for i, line in enumerate(lines):
        of = [r for r in records if line.startswith(f"| {name(r)} |")]
        lines[i] += f" {equal_at(of):.0%} |" if of else " equal at |" if i == 0 else " --- |"
    return "\n".join(lines)


def equal_at(records):
    """The share at which a straight line between two of the records has both times equal."""
    points = [
        (r["survive"], r["ms"]["int8"] / r["ms"]["dense"])
        for r in sorted(records, key=lambda r: r["survive"])
    ]
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
        [
            r["case"],
            number(r["ms"]["auto"]),
            number(r["ms"]["off"]),
            number(r["ms"]["auto"] / r["ms"]["off"]),
        ]
        for r in crossovers["adverse"]
    ]
    return markdown(["rows or weights", '"auto", ms', '"off", ms', "auto over off"], lines)


def short(results):
    """README's table: a few cases, two baselines."""
    records = {record["case"]: record for record in results["cases"]}
    names = ["reference fp32", "linear+topk bf16"]
    lines = []
    for case, title in SHORT.items():
        ours = median(records[case])
        ratios = [number(median(records[case], name) / ours) for name in names]
        lines.append([title, *ratios])
    return markdown(["", "reference pipeline, float32", "linear + topk, bfloat16"], lines)


def machine(results):
    """What the numbers were measured on, and what it can do."""
    of, first = results["machine"], results["cases"][0]
    long = max(results["cases"], key=lambda r: r["T"])
    extra = {n: (long["contenders"][n]["extra_bytes"] or 0) / MIB for n in (OURS, "reference fp32")}
    copies = first["memory"]["screening_bytes"] / (first["F"] * first["H"] * first["layers"])
    lines = [
        ["processor", of["cpu"]],
        ["cores, threads", f"{of['cores']}, {of['threads']}"],
        ["instruction sets", " ".join(of["flags"])],
        ["torch", of["torch"]],
        ["eai-sparsify", of.get("eai-sparsify", "")],
        ["circuit-tracer", of.get("circuit-tracer", "")],
        ["torch's float32 product, GFLOP/s", number(of["product_fp32_gflops"])],
        ["torch's bfloat16 product, GFLOP/s", number(of["product_bf16_gflops"])],
        ["int8 instructions on registers, GOP/s", str(of.get("int8_peak_gops", ""))],
        ["int8 screen on L1, GOP/s", str(of.get("int8_tile_gops", ""))],
        ["int8 screen of a call, GOP/s", str(max(r.get("int8_gops", 0) for r in results["cases"]))],
        ["reads from memory, GB/s", str(of["read_gb_per_s"])],
        [f"seconds to build {first['F']} x {first['H']}", f"{first['build_s']:.2f}"],
        ["bytes of copies per weight", f"{copies:.1f}"],
        [f"MiB beyond input and result: {long['case']}", number(extra[OURS])],
        ["the same, reference pipeline in chunks", number(extra["reference fp32"])],
    ]
    return markdown(["", "value"], lines)


def gpu(results):
    """How many times faster than each baseline on the card, and the share of its roof."""
    lines = []
    for record in results["cases"]:
        of = record["contenders"]
        ours = of[OURS]["ms"]["median"]
        ratios = [
            number(of[name]["ms"]["median"] / of[name]["ours"]["ms"]["median"])
            if name in of
            else ""
            for name in GPU_BASELINES
        ]
        share = record.get("share_of_pinned_copy", record["share_of_roof"])
        lines.append([record["case"], f"{ours:.3f}", f"{share:.0%}", *ratios])
    return markdown(["case", "ours, ms", "share of the roof", *GPU_BASELINES], lines)


def gpu_machine(results):
    of = results["machine"]
    lines = [
        ["card", of["card"]],
        ["torch", of["torch"]],
        ["bfloat16 product 8192, TFLOP/s", str(of["bf16_tflops"])],
        ["copy on the card, read + written, GB/s", str(of["copy_gb_per_s"])],
        ["copy from pinned host memory, GB/s", str(of["pinned_gb_per_s"])],
    ]
    return markdown(["", "value"], lines)


def corpus_speed(results):
    lines = []
    for name, of in results["speed"]["ways"].items():
        seconds = [of[key] for key in ("seconds", "model_seconds", "beyond_model_seconds")]
        share = of["beyond_model_seconds"] / of["model_seconds"]
        lines.append(
            [name, f"{of['tokens_per_second']:.0f}", *map(number, seconds), f"{share:.0%}"]
        )
    titles = ["", "tokens/s", "seconds", "of the model", "beyond it", "share of the model's"]
    return markdown(titles, lines)


def gpu_screens(results):
    """Microseconds of a call of few rows with each screen."""
    lines = []
    for case in results["screens"]:
        if case["T"] not in (1, 8, 16, 32, 64):
            continue
        us = case["us"]
        times = [us[name] for name in ("int16", "int8", "auto")]
        name = "{T} x {H} x {F} {kind}".format(**case)
        lines.append([name, *map(number, (*times, us["int16"] / us["auto"]))])
    titles = ["bf16 case", "bfloat16, us", "int8, us", "auto, us", "auto, times faster"]
    return markdown(titles, lines)


def gpu_products(results):
    """The screen's product of few rows beside what reading its weights takes the card's copy."""
    lines = []
    for record in results["cases"]:
        kernels = record["contenders"][OURS]["kernels"]
        names = [name for name in kernels if name.startswith("product_")]
        if len(names) != 1 or record["layers"] > 1 or record["kind"] != "planted":
            continue
        byte_count = record["F"] * record["H"] * (1 if "int" in names[0] else 2)
        roof, us = byte_count / results["machine"]["copy_gb_per_s"] / 1e3, kernels[names[0]][0]
        cells = [f"{byte_count / 1e6:.0f}", number(roof), number(us), f"{roof / us:.0%}"]
        lines.append([record["case"], f"`{names[0]}`", *cells])
    titles = ["case", "kernel", "MB of weights", "us at the copy's rate", "us", "share"]
    return markdown(titles, lines)


def corpus_memory(results):
    """Peak MiB of a process, by the number of tokens."""
    columns = sorted({row["tokens"] for row in results["memory"]})
    lines = []
    for way in dict.fromkeys(row["way"] for row in results["memory"]):
        of = {r["tokens"]: f"{r['peak_mib']:,.0f}" for r in results["memory"] if r["way"] == way}
        lines.append([way, *(of.get(tokens, "") for tokens in columns)])
    return markdown(["peak MiB, tokens:", *(f"{tokens:,}" for tokens in columns)], lines)


def attribution(results):
    """circuit-tracer's feature step, its own and on the engine: milliseconds and MiB."""
    of = results["machine"]
    shared = ", shared with other work" if of["shared"] else ""
    lines = []
    for case in results["cases"]:
        ms, mib = ([case[kind][way] for way in WAYS] for kind in ("ms", "mib"))
        lines.append(
            [
                case["name"],
                f"{case['active_per_row']:.0f}",
                *map(number, ms),
                number(ms[0] / ms[1]),
                *map(number, mib),
            ]
        )
    heads = [*(f"{way}, ms" for way in WAYS), "times as fast", *(f"{way}, MiB" for way in WAYS)]
    case = f"{of['cpu']}, {of['threads']} threads{shared}"
    return markdown([case, "active per row", *heads], lines)


def server_speeds(results):
    """Tokens per second of the feature server, and what the engine adds to the model's time."""
    shares = {record["streams"]: record["encode_over_decode"] for record in results["shares"]}
    lines = []
    for streams, share in shares.items():
        of = {r["features"]: r for r in results["speeds"] if r["streams"] == streams}
        speed = [number(one["tokens_per_s"]) for one in of.values()]
        cpu = [number(one["cpu_ms_per_token"]) for one in of.values()]
        lines.append([str(streams), *speed, *cpu, f"{share:.1%}"])
    titles = ["streams", "tokens/s, off", "1 layer", "4 layers", "CPU ms per token, off"]
    return markdown([*titles, "1 layer", "4 layers", "encode over model, 4 layers"], lines)


def server_latencies(results):
    lines = [
        [str(r["tokens"]), str(r["repeats"]), *(number(r[f"p{p}_ms"]) for p in (50, 95, 99))]
        for r in results["latencies"]
    ]
    return markdown(["tokens of the prompt", "requests", "p50, ms", "p95, ms", "p99, ms"], lines)


def server_wire(results):
    lines = [[name, number(value)] for name, value in results["wire_bytes_per_token"].items()]
    return markdown(["a streamed token", "bytes"], lines)


def server_memory(results):
    names = {
        "resident": "resident, all",
        "model_file": "the model's file, mapped",
        "declared": "transcoders, mapped",
        "screening": "their screening copies",
        "workspace": "the engine's workspaces",
    }
    lines = [[title, number(results["memory"][key] / MIB)] for key, title in names.items()]
    return markdown(["", "MiB"], lines)


def threads(results):
    """Milliseconds of a call on torch's threads and on own ones."""
    whens = ("after torch", "after a pause")
    names = ("torch's threads", "own threads")
    lines = []
    for record in results["cases"]:
        lines.append(
            [record["case"], *(number(record[when][name]) for when in whens for name in names)]
        )
    return markdown(["ms", *(f"{when}: {name}" for when in whens for name in names)], lines)


def tables():
    """{name: table} of every table in the documents."""
    read = {
        name: json.loads((RESULTS / f"{name}.json").read_text())
        for name in (
            "cpu",
            "cpu_one_thread",
            "threads",
            "crossovers",
            "gpu",
            "gpu_screens",
            "attribution",
            "corpus",
            "server",
        )
    }
    cpu, crossovers, card = read["cpu"], read["crossovers"], read["gpu"]
    return {
        "short": short(cpu),
        "machine": machine(cpu),
        "speeds": speeds(cpu),
        "one_thread": speeds(read["cpu_one_thread"]),
        "threads": threads(read["threads"]),
        "survivors": survivors(cpu),
        "screens": screens(cpu),
        "phases": phases(cpu),
        "one_thread_phases": phases(read["cpu_one_thread"]),
        "shares": shares(crossovers),
        "planes": planes(crossovers),
        "rows": rows(crossovers),
        "adverse": adverse(crossovers),
        "gpu": gpu(card),
        "gpu_machine": gpu_machine(card),
        "gpu_products": gpu_products(card),
        "gpu_screens": gpu_screens(read["gpu_screens"]),
        "corpus_speed": corpus_speed(read["corpus"]),
        "corpus_memory": corpus_memory(read["corpus"]),
        "attribution": attribution(read["attribution"]),
        "server_speeds": server_speeds(read["server"]),
        "server_latencies": server_latencies(read["server"]),
        "server_wire": server_wire(read["server"]),
        "server_memory": server_memory(read["server"]),
    }


def written():
    """{path: its text with the results' tables}"""
    made = tables()
    texts, used = {}, set()

    def put(match):
        used.add(match[1])
        return f"<!-- table: {match[1]} -->\n\n{made[match[1]]}\n\n<!-- end -->"

    for path in DOCUMENTS:
        pattern = r"(?s)<!-- table: (\w+) -->.*?<!-- end -->"
        texts[path] = re.sub(pattern, put, path.read_text())
    if used != made.keys():
        missing = ", ".join(sorted(made.keys() - used))
        raise SystemExit(f"no document has a place for the tables {missing}")
    for name, plot, results in (("speed", draw, "cpu"), ("memory", draw_memory, "corpus")):
        texts[ROOT / "docs" / f"{name}.svg"] = plot(
            json.loads((RESULTS / f"{results}.json").read_text())
        )
    return texts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="into the documents, with the plot")
    if parser.parse_args().write:
        for path, text in written().items():
            path.write_text(text)
    else:
        print("\n\n".join(tables().values()))


if __name__ == "__main__":
    main()
