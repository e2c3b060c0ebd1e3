"""Draw what the site shows besides its notebooks: `python docs/pictures.py` writes the chart of batches a second, the favicon and the social card.

They are committed; tests/test_docs_visitors.py says when the chart is older than benchmarks/results.md.
"""
from __future__ import annotations

import re
from html import escape
from pathlib import Path
from textwrap import wrap

ROOT = Path(__file__).resolve().parents[1]
RESULTS, CHART, STATIC = ROOT / "benchmarks" / "results.md", ROOT / "nbs" / "images" / "batches_a_second.svg", ROOT / "docs" / "_static"
OURS, BLUE, GREY, WIDTH = "data_io_nbdev", "#0969da", "#afb8c1", 470
FONT = "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"
SUMS = {"uniform": "256 rows at random", "prioritized": "256 rows by priority, and new priorities for them",
        "n-step": "256 rows with the return of 5 steps", "windows": "32 slices of 64 steps"}


def batches(results: str) -> dict[str, dict[str, float]]:
    "Batches a second, by kind of batch and by buffer, fastest first, from the first table of the results, which is in µs a batch"
    rows = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in re.search(r"^\|.*?(?=\n\n|\Z)", results, re.M | re.S)[0].split("\n")]
    (unit, *kinds), _, *rows = rows
    if unit != "µs a batch": raise ValueError(f"expected a table of 'µs a batch', got {unit!r}; see batches() in docs/pictures.py")
    found = {kind: {row[0]: 1e6 / float(row[i].replace(",", "")) for row in rows if not row[0].startswith("floor") and row[i] != "–"}
             for i, kind in enumerate(kinds, 1)}
    return {kind: dict(sorted(speeds.items(), key=lambda item: -item[1])) for kind, speeds in found.items()}


def chart(results: str) -> str:
    "Bars as SVG, one group for each kind of batch, all on one scale"
    found, lines, y = batches(results), [], 34
    most = max(max(speeds.values()) for speeds in found.values())
    for kind, speeds in found.items():
        lines.append(f'<text x="10" y="{y}" font-weight="600">{escape(kind)}<tspan class="s" dx="10">{escape(SUMS.get(kind, ""))}</tspan></text>')
        for name, speed in speeds.items():
            y, width = y + 26, max(2, round(240 * speed / most))
            mine = ' font-weight="600"' * (name == OURS)
            digits = 10 ** max(0, len(f"{speed:.0f}") - 2)
            lines.append(f'<text x="10" y="{y}"{mine}>{escape(name)}</text><rect x="152" y="{y - 14}" width="{width}" height="18" rx="2" '
                         f'fill="{BLUE if name == OURS else GREY}"/><text x="{160 + width}" y="{y}"{mine}>{round(speed / digits) * digits:,}</text>')
        y += 44
    measured, _, *remarks = re.search(r"^- (\d{4}-\d\d-\d\d, .*)\Z", results.strip(), re.M | re.S)[1].split("\n- ")  # the second are versions
    for note in ("batches a second; longer is better", measured, *remarks):
        for line in wrap(note, 66):
            lines.append(f'<text class="s" x="10" y="{y - 6}">{escape(line)}</text>')
            y += 18
    size = f'width="{WIDTH}" height="{y}"'  # narrow, so that it can be read on a phone
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {WIDTH} {y}" font-family="{FONT}" font-size="15" '
                      'fill="#1f2328" role="img" aria-label="batches a second, beside other replay buffers">',
                      '<style>.s{fill:#57606a;font-size:13px;font-weight:400}</style>', f'<rect {size} rx="8" fill="#ffffff"/>', *lines, "</svg>", ""])


FAVICON = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">
<rect width="32" height="32" rx="7" fill="{BLUE}"/>
<g fill="#fff"><rect x="6" y="6" width="20" height="5" rx="1.5"/><rect x="6" y="13.5" width="20" height="5" rx="1.5" opacity=".75"/>
<rect x="6" y="21" width="8" height="5" rx="1.5"/><rect x="18" y="21" width="8" height="5" rx="1.5" opacity=".5"/></g>
</svg>
"""


def card(path: Path, title: str, text: str) -> None:
    "The picture that a link to the site shows in a chat: 1200 x 630 pixels"
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    figure = Figure(figsize=(12, 6.3), dpi=100, facecolor="#0d1117")
    for y, width, alpha in ((0.84, 1, 1), (0.77, 1, 0.75), (0.70, 0.4, 1)):
        figure.add_artist(Rectangle((0.08, y), 0.1 * width, 0.045, color=BLUE, alpha=alpha))
    figure.text(0.08, 0.50, title, color="white", fontsize=64, weight="bold")
    figure.text(0.08, 0.40, "\n".join(wrap(text, 48)), color="#c9d1d9", fontsize=30, va="top", linespacing=1.5)
    figure.savefig(path, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    from nbdev.config import get_config
    CHART.write_text(chart(RESULTS.read_text(encoding="utf-8")), encoding="utf-8")
    (STATIC / "favicon.svg").write_text(FAVICON, encoding="utf-8")
    if not (made := STATIC / "card.png").exists(): card(made, get_config().title, get_config().description)  # fonts differ; delete it to draw it anew
