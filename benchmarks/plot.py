"""The documents' plots, from the benchmarks' results: how many times faster the encoder is, over the
number of rows, and the memory of an encoded corpus, over the number of tokens. table.py writes them.
"""

import math

SHAPES = [(2048, 16384), (5120, 40960), (576, 4608)]
PANELS = {
    "reference fp32": "than the reference pipeline in float32",
    "linear+topk bf16": "than linear + topk in bfloat16",
}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 430, 320, 44, 14, 74, 46  # of a panel
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #333 } .small { font-size: 12px; fill: #666 } .title { font-weight: 600 }
.grid { stroke: #ddd } .equal { stroke: #888; stroke-dasharray: 4 4 }
.line { fill: none; stroke-width: 2.25; stroke-linejoin: round }
.a { stroke: #0b69c7; fill: #0b69c7 } .b { stroke: #c2410c; fill: #c2410c } .c { stroke: #15803d; fill: #15803d }
.line.a, .line.b, .line.c { fill: none }
@media (prefers-color-scheme: dark) {
  text { fill: #ddd } .small { fill: #aaa } .grid { stroke: #3a3a3a }
  .a { stroke: #6cb2ff; fill: #6cb2ff } .b { stroke: #ff9a62; fill: #ff9a62 } .c { stroke: #63d48a; fill: #63d48a }
}
"""


def series(results, shape, baseline):
    """[(rows, times faster)] of the planted float32 cases of a shape."""
    found = {}
    for record in results["cases"]:
        of = record["contenders"]
        plain = record["kind"] == "planted" and record["dtype"] == "float32" and baseline in of
        if plain and (record["H"], record["F"]) == shape:
            found[record["T"]] = (
                of[baseline]["ms"]["median"] / of["sparse_transcoder"]["ms"]["median"]
            )
    return sorted(found.items())


def draw_panel(title, lines, left, most_rows):
    right, bottom = left + WIDTH - RIGHT, HEIGHT - BOTTOM
    top = max((ratio for line in lines for _, ratio in line), default=1) * 1.06
    step = next(step for step in (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100) if top / step <= 7)

    def place(rows, ratio):
        x = left + LEFT + math.log2(rows) / math.log2(most_rows) * (right - left - LEFT)
        return f"{x:.1f}", f"{bottom - ratio / top * (bottom - TOP):.1f}"

    svg = [f'<text class="title" x="{left + LEFT}" y="{TOP - 16}">Times faster {title}</text>']
    for i in range(int(top / step) + 1):
        y = place(1, i * step)[1]
        svg.append(f'<path class="grid" d="M{left + LEFT} {y}H{right}"/>')
        svg.append(
            f'<text class="small" x="{left + LEFT - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{i * step:g}</text>'
        )
    y = place(1, 1)[1]
    svg.append(f'<path class="equal" d="M{left + LEFT} {y}H{right}"/>')
    svg.append(
        f'<text class="small" x="{right}" y="{float(y) - 5:.1f}" text-anchor="end">equally fast</text>'
    )
    for rows in (1, 4, 16, 64, 256, 1024):
        if rows <= most_rows:
            svg.append(
                f'<text class="small" x="{place(rows, 0)[0]}" y="{bottom + 18}" text-anchor="middle">{rows}</text>'
            )
    svg.append(
        f'<text class="small" x="{(left + LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">rows a layer</text>'
    )
    for name, line in zip("abc", lines, strict=True):
        points = [place(*point) for point in line]
        svg.append(
            f'<path class="line {name}" d="M{"L".join(" ".join(point) for point in points)}"/>'
            if points
            else ""
        )
        svg += [f'<circle class="{name}" r="3" cx="{x}" cy="{y}"/>' for x, y in points]
    return svg


def draw(results):
    lines = {
        baseline: [series(results, shape, baseline) for shape in SHAPES] for baseline in PANELS
    }
    most_rows = max(
        [rows for panel in lines.values() for line in panel for rows, _ in line], default=2
    )
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH * len(PANELS)} {HEIGHT}" role="img">'
    ]
    svg += [
        "<title>Times faster than two dense pipelines, over the rows a call, for three shapes</title>"
    ]
    svg += [f"<style>{STYLE}</style>"]
    for i, (name, (H, F)) in enumerate(zip("abc", SHAPES, strict=True)):
        x = LEFT + 190 * i
        svg.append(
            f'<path class="line {name}" d="M{x} 24h26"/><circle class="{name}" r="3" cx="{x + 13}" cy="24"/>'
        )
        svg.append(f'<text x="{x + 34}" y="28">H {H}, F {F}</text>')
    for i, (baseline, title) in enumerate(PANELS.items()):
        svg += draw_panel(title, lines[baseline], i * WIDTH, most_rows)
    return "\n".join([*svg, "</svg>\n"])


def draw_memory(results):
    """Peak memory over tokens, both on a logarithmic scale, of each way that was measured."""
    ways = {}
    for row in results["memory"]:
        ways.setdefault(row["way"], []).append((row["tokens"], row["peak_mib"]))
    points = [point for line in ways.values() for point in line]
    bounds = [(min(values), max(values)) for values in zip(*points, strict=True)]
    low, high = 2 ** math.floor(math.log2(bounds[1][0])), 2 ** math.ceil(math.log2(bounds[1][1]))
    left, right, top, bottom = LEFT + 30, 2 * WIDTH - RIGHT - 30, TOP - 20, HEIGHT - BOTTOM

    def place(tokens, mib):
        x = math.log(tokens / bounds[0][0]) / math.log(bounds[0][1] / bounds[0][0])
        y = math.log(mib / low) / math.log(high / low)
        return f"{left + x * (right - left):.1f}", f"{bottom - y * (bottom - top):.1f}"

    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {HEIGHT}" role="img">',
        "<title>Peak memory of encoding a corpus, over its number of tokens</title>",
        f"<style>{STYLE}</style>",
    ]
    mib = low
    while mib <= high:
        y = place(bounds[0][0], mib)[1]
        svg.append(f'<path class="grid" d="M{left} {y}H{right}"/>')
        svg.append(
            f'<text class="small" x="{left - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{mib:,} MiB</text>'
        )
        mib *= 2
    for tokens in sorted({tokens for tokens, _ in points}):
        svg.append(
            f'<text class="small" x="{place(tokens, low)[0]}" y="{bottom + 18}" text-anchor="middle">{tokens:,}</text>'
        )
    svg.append(
        f'<text class="small" x="{(left + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">tokens of the corpus</text>'
    )
    for i, (name, (way, line)) in enumerate(zip("abc", ways.items(), strict=False)):
        path = [place(*point) for point in sorted(line)]
        svg.append(f'<path class="line {name}" d="M{"L".join(" ".join(p) for p in path)}"/>')
        svg += [f'<circle class="{name}" r="3" cx="{x}" cy="{y}"/>' for x, y in path]
        x = left + 220 * i
        svg.append(
            f'<path class="line {name}" d="M{x} 24h26"/><circle class="{name}" r="3" cx="{x + 13}" cy="24"/>'
        )
        svg.append(f'<text x="{x + 34}" y="28">{way}</text>')
    return "\n".join([*svg, "</svg>\n"])
