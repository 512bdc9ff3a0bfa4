"""Draw S and the rise of the loss against the number of active edits, from the results of `bench/evidence.py`.

    python bench/evidence.py --out runs/evidence --single 0 --sequence 1000 --only rome "rome, gated" memit
    python bench/growth.py runs/evidence/almanac --out docs/figures/growth.png

Each folder is that of one model and becomes one row of the figure. The numbers are stored beside it as JSON.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from service.kit.plotting import FOREGROUND, FigureBuilder, render_png

Curve = list[dict[str, float]]  #: points with the keys edits, S, loss
FOLDER = re.compile(r"sequence-(?P<method>.+)-\d+")
PANEL_WIDTH, PANEL_HEIGHT, ROW_HEIGHT = 3.4, 2.3, 3.0  # inches
COLOURS = ("#581c87", "#b45309", "#0f766e", "#be123c", "#1d4ed8", "#4d7c0f", "#6b7280", "#a21caf")
MARKERS = "osD^vPX*"


def read_curves(folder: Path) -> dict[str, Curve]:
    """Return the points of each method, by its name in the folder, in the order of the numbers of edits."""
    points: dict[str, dict[float, dict[str, float]]] = {}
    for path in sorted(folder.glob("sequence-*/result.json")):
        match = FOLDER.fullmatch(path.parent.name)
        assert match is not None
        for checkpoint in json.loads(path.read_text(encoding="utf-8"))["checkpoints"]:
            count = checkpoint["edits"]
            s, damage = checkpoint["measures"]["S"], checkpoint["damage"]
            if count >= 10 and s and damage:
                point = {"edits": count, "S": 100 * s["mean"], "loss": 100 * damage["loss_rise"]}
                points.setdefault(match["method"], {})[count] = point
    return {name: [p for _, p in sorted(by_count.items())] for name, by_count in sorted(points.items())}


def draw_growth(curves_by_model: Mapping[str, Mapping[str, Curve]]) -> FigureBuilder:
    """Return the figure: a row for each model, S on the left and the loss on the right."""
    sheet = FigureBuilder(9.6, 0.2 + ROW_HEIGHT * len(curves_by_model))
    methods = sorted({name for curves in curves_by_model.values() for name in curves})
    for row, (model, curves) in enumerate(curves_by_model.items()):
        top = 0.35 + ROW_HEIGHT * row
        score = sheet.add_axes(0.7, top, PANEL_WIDTH, PANEL_HEIGHT)
        loss = sheet.add_axes(1.35 + PANEL_WIDTH, top, PANEL_WIDTH, PANEL_HEIGHT)
        for name, curve in curves.items():
            number = methods.index(name)
            style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % 8]}
            counts = [p["edits"] for p in curve]
            score.plot(counts, [p["S"] for p in curve], linewidth=1.6, markersize=4, label=name, **style)
            loss.plot(counts, [p["loss"] for p in curve], linewidth=1.6, markersize=4, **style)
        score.set_ylabel("S, %", fontsize=9, color=FOREGROUND)
        loss.set_ylabel("rise of the loss on other statements, %", fontsize=9, color=FOREGROUND)
        loss.set_yscale("symlog", linthresh=1)
        loss.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        for axes in (score, loss):
            _style(axes)
        sheet.add_text(0.7, top - 0.08, model, fontsize=10, fontweight="bold", va="bottom")
        score.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(2.2, 1.0), borderaxespad=0)
    return sheet


def _style(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_xlabel("active edits", fontsize=9, color=FOREGROUND)
    axes.grid(axis="y", linewidth=0.5, alpha=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="of one model: --out and its name")
    p.add_argument("--out", type=Path, default=Path("docs/figures/growth.png"))
    args = p.parse_args()
    curves = {folder.name: read_curves(folder) for folder in args.folders}
    args.out.with_suffix(".json").write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
    args.out.write_bytes(render_png(lambda: draw_growth(curves)))
    print(args.out)


if __name__ == "__main__":
    main()
