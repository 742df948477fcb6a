"""A picture of ratios, readable on white and on black."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

mpl.use("svg")

TEXT = "#768390"
"""Readable on white and on black."""
COLORS = ("#2f81f7", "#e0823d", "#3fa34d", "#d1495b", "#9467bd", "#00a3a3", "#b8860b", "#c06c9b")
MARKERS = "osD^vPX*"


def plot(panels: Mapping[str, Mapping[str, Mapping[str, float]]], label: str, path: Path) -> None:
    """Draw ``panels[title][row][series]`` as dots on a logarithmic axis, one panel beneath the other.

    The same values give the same bytes.
    """
    series = list(dict.fromkeys(name for rows in panels.values() for row in rows.values() for name in row))
    styles = {name: (COLORS[place % len(COLORS)], MARKERS[place % len(MARKERS)]) for place, name in enumerate(series)}
    settings: dict[Any, Any] = {
        "svg.hashsalt": "benchmarks",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT),
    }
    heights = [max(len(rows), 2) for rows in panels.values()]
    with mpl.rc_context(settings):
        figure, axes = plt.subplots(
            len(panels),
            1,
            figsize=(9, 1.2 + 0.9 * len(panels) + 0.27 * sum(heights)),
            gridspec_kw={"height_ratios": heights},
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
        for axis, (title, rows) in zip(axes[:, 0], panels.items(), strict=True):
            for place, row in enumerate(rows.values()):
                for name, value in row.items():
                    color, marker = styles[name]
                    axis.plot(value, place, marker, color=color, markersize=6, clip_on=False, alpha=0.9)
            axis.set_title(title, loc="left", fontweight="bold")
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
            axis.tick_params(axis="x", labelbottom=True)
            axis.set_yticks(range(len(rows)), list(rows))
            axis.invert_yaxis()
            axis.axvline(1, color=TEXT, linewidth=1.2)
            axis.grid(axis="both", color=TEXT, alpha=0.25, linewidth=0.6)
            axis.patch.set_alpha(0)
            for side in ("top", "right", "left"):
                axis.spines[side].set_visible(False)
        axes[-1, 0].set_xlabel(label)
        handles = [
            Line2D([], [], color=color, marker=marker, linestyle="", label=name)
            for name, (color, marker) in styles.items()
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
