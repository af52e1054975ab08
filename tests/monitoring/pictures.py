"""A dashboard as a picture, drawn by matplotlib from the committed JSON and Prometheus' answers to its queries.

Colours and axes are only similar to Grafana's.
"""

from __future__ import annotations

import re
import textwrap
import time
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from tests.monitoring.names import expanded
from tests.monitoring.watch import Prometheus

Json: TypeAlias = dict[str, Any]
COLUMN_INCHES, ROW_INCHES, DPI = 0.56, 0.3, 110
LEGEND_COLUMNS_MAX, LEGEND_ROWS_MAX = 6, 3
COLOURS = ("#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#705da0", "#37872d", "#fade2a")
PAPER, INK, FAINT = "#181b1f", "#d8d9da", "#3a3d42"
NAMES = {
    "green": "#299c46",
    "red": "#c4162a",
    "orange": "#d9730d",
    "transparent": PAPER,
    "blue": "#5794f2",
    "purple": "#b877d9",
}
CAPTION = (
    "Drawn from the dashboard's queries by matplotlib, not by Grafana. {what} "
    "Dotted: an epoch (blue) or a fingerprint (purple) begins."
)


def draw(path: Path, board: Json, prometheus: Prometheus, start: float, end: float, what: str) -> None:
    """Draw all panels between these Unix times. `what`: a sentence about the system, for the caption."""
    mpl.rcParams.update({"font.family": "sans-serif", "font.size": 7, "text.color": INK, "text.parse_math": False})
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"]) + 1
    figure = Figure(figsize=(24 * COLUMN_INCHES, height * ROW_INCHES), facecolor="#111217")
    answers = Answers(prometheus, start, end, board["annotations"]["list"])
    for panel in board["panels"]:
        at = panel["gridPos"]
        left, bottom = at["x"] / 24, 1 - (at["y"] + at["h"]) / height
        if panel["type"] == "row":
            figure.text(0.005, bottom + 0.3 / height, panel["title"], weight="bold", fontsize=9)
            continue
        place = figure.add_axes((left + 0.002, bottom + 0.1 / height, at["w"] / 24 - 0.004, (at["h"] - 0.2) / height))
        place.set(facecolor=PAPER, xticks=[], yticks=[])
        place.spines[:].set_visible(False)
        place.set_title(panel["title"], loc="left", y=1, pad=-11, x=0.01, fontsize=7.5)
        DRAWN[panel["type"]](place, panel, answers)
    figure.text(0.005, 0.25 / height, CAPTION.format(what=what), fontsize=7, color="#9fa7b3")
    with BytesIO() as full:
        figure.savefig(full, format="png", dpi=DPI)
        Image.open(full).convert("RGB").quantize(128).save(path, optimize=True)


class Answers:
    def __init__(self, prometheus: Prometheus, start: float, end: float, annotations: list[Json]) -> None:
        self._prometheus, self.start, self.end = prometheus, start, end
        self.marks = [
            (float(series["values"][0][0]), each["iconColor"])
            for each in annotations
            for series in prometheus.over(expanded(each["expr"]), start, end)
        ]
        """Times of annotations, and their colours."""

    def over(self, panel: Json) -> list[tuple[str, Json, np.ndarray, np.ndarray]]:
        """Legend, labels, times and values of each series."""
        found = []
        for target in panel["targets"]:
            for series in self._prometheus.over(expanded(target["expr"]), self.start, self.end):
                points = np.array([(float(at), float(value)) for at, value in series["values"]])
                found.append((legend(target, series["metric"]), series["metric"], points[:, 0], points[:, 1]))
        return found

    def now(self, panel: Json) -> list[tuple[Json, float]]:
        results = (self._prometheus.now(expanded(target["expr"])) for target in panel["targets"])
        return [(each["metric"], float(each["value"][1])) for result in results for each in result]

    def exemplars(self, panel: Json) -> list[tuple[float, float]]:
        """Times and values, if a query requests exemplars."""
        queries = {target["expr"] for target in panel["targets"] if target.get("exemplar")}
        found = (self._prometheus.exemplars(expanded(query), self.start, self.end) for query in queries)
        return [
            (each["timestamp"], float(each["value"])) for answer in found for series in answer for each in series["exemplars"]
        ]


def legend(target: Json, labels: Mapping[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), target["legendFormat"])


def _number(place: Axes, panel: Json, answers: Answers) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    found = answers.now(panel)
    text, colour = (written(found[-1][1], defaults["unit"]), PAPER) if found else ("No data", PAPER)
    for step in defaults.get("thresholds", {}).get("steps", ()) if found else ():
        if step["value"] is None or found[-1][1] >= step["value"]:
            colour = step["color"]
    for mapping in defaults.get("mappings", ()) if found else ():
        named = mapping["options"].get(f"{found[-1][1]:g}")
        text, colour = (named["text"], named["color"]) if named else (text, colour)
    place.set_facecolor(NAMES.get(colour, colour))
    place.text(0.5, 0.4, text, ha="center", va="center", fontsize=15, transform=place.transAxes, color="white")


def _lines(place: Axes, panel: Json, answers: Answers) -> None:
    inner = _inside(place, answers)
    defaults = panel["fieldConfig"]["defaults"]
    steps = defaults.get("custom", {}).get("lineInterpolation") == "stepAfter"
    series = answers.over(panel)
    for number, (name, _, times, values) in enumerate(series):
        dashed = re.search(r" (lower|upper|limit)$", name)
        inner.plot(
            times, values, label=name, color=COLOURS[number % len(COLOURS)], linewidth=0.9,
            linestyle="--" if dashed else "-", drawstyle="steps-post" if steps else "default",
        )  # fmt: skip
    for at, value in answers.exemplars(panel):
        inner.plot(at, value, marker="D", markersize=2.5, color="#5794f2", alpha=0.7)
    for step in defaults.get("thresholds", {}).get("steps", ()):
        if step["value"] is not None:
            inner.axhline(step["value"], color=NAMES.get(step["color"], step["color"]), linestyle="--", linewidth=0.8)
    inner.set_ylim(bottom=defaults.get("min"))
    inner.yaxis.set_major_formatter(lambda value, _: written(value, defaults["unit"]))
    if series:
        _legend(place, inner)
    else:
        inner.text(0.5, 0.5, "No data", ha="center", transform=inner.transAxes)


def _legend(place: Axes, inner: Axes) -> None:
    """Below the axes, in as many columns as fit. Entries without room are counted."""
    assert isinstance(place.figure, Figure)
    handles, names = inner.get_legend_handles_labels()
    look: Any = {"loc": "upper left", "bbox_to_anchor": (0, -0.14), "frameon": False, "fontsize": 5.5, "labelcolor": INK}
    for columns in range(LEGEND_COLUMNS_MAX, 0, -1):
        room = columns * LEGEND_ROWS_MAX
        more = len(names) - room + 1 if len(names) > room else 0
        shown = [*names[: len(names) - more], f"and {more} more"] if more else names
        lines = [*handles[: len(names) - more], Line2D([], [], alpha=0)] if more else handles
        made = inner.legend(lines, shown, ncols=columns, **look)
        if made.get_window_extent().x1 <= place.get_window_extent().x1:
            return


def _heat(place: Axes, panel: Json, answers: Answers) -> None:
    inner = _inside(place, answers, bottom=0.12)
    series = sorted(answers.over(panel), key=lambda each: float(each[1]["le"]))
    times = sorted({float(at) for _, _, column, _ in series for at in column})
    cumulative = np.zeros((len(series), len(times)))
    for row, (_, _, column, values) in enumerate(series):
        cumulative[row, np.searchsorted(times, column)] = values
    counts = np.ma.masked_less_equal(np.diff(cumulative, axis=0, prepend=0), 0.01)
    inner.pcolormesh([*times, times[-1] + 1], np.arange(len(series) + 1), counts, cmap="Blues_r", norm=LogNorm())
    unit = panel["options"]["yAxis"].get("unit", "none")
    bounds = [float(labels["le"]) for _, labels, _, _ in series]
    every = max(1, len(bounds) // 6)
    inner.set_yticks(range(1, len(bounds) + 1)[::every], [written(bound, unit) for bound in bounds[::every]])


def _bars(place: Axes, panel: Json, answers: Answers) -> None:
    inner = place.inset_axes((0.07, 0.18, 0.91, 0.64))
    inner.set_facecolor(PAPER)
    inner.spines[:].set_visible(False)
    found = sorted((float(labels["le"]), value) for labels, value in answers.now(panel))
    values = np.diff([value for _, value in found], prepend=0)
    if not values.any():
        inner.text(0.5, 0.5, "none", ha="center", transform=inner.transAxes)
        inner.set_axis_off()
        return
    inner.bar(range(len(found)), values, color=COLOURS[0])
    inner.set_xticks(range(len(found)), [written(bound, "short") for bound, _ in found], fontsize=5.5, rotation=60)
    inner.tick_params(colors=INK, length=0)


def _table(place: Axes, panel: Json, answers: Answers) -> None:
    lines = []
    for labels, _ in answers.now(panel):
        kept = {name: value[:16] for name, value in labels.items() if name not in ("__name__", "job")}
        lines += textwrap.wrap("   ".join(f"{name}: {value}" for name, value in kept.items()), 105)
    place.text(0.01, 0.75, "\n".join(lines), va="top", fontsize=6.5, transform=place.transAxes)


def _inside(place: Axes, answers: Answers, bottom: float = 0.3) -> Axes:
    inner = place.inset_axes((0.085, bottom, 0.9, 0.85 - bottom))
    inner.set(facecolor=PAPER, xlim=(answers.start, answers.end))
    inner.spines[:].set_visible(False)
    inner.grid(visible=True, color=FAINT, linewidth=0.4)
    inner.tick_params(colors=INK, length=0, labelsize=6)
    inner.xaxis.set_major_formatter(lambda value, _: time.strftime("%H:%M:%S", time.gmtime(value)))
    inner.locator_params(axis="x", nbins=6)
    for at, colour in answers.marks:
        inner.axvline(at, color=NAMES[colour], linestyle=":", linewidth=0.8)
    return inner


def written(value: float, unit: str) -> str:
    """A value with its unit, short enough for a tick label."""
    if not np.isfinite(value):
        return "+Inf"
    match unit:
        case "percentunit":
            return f"{100 * value:.4g} %"
        case "s" if value:
            size, name = next(((s, n) for s, n in ((86400, "d"), (1, "s"), (1e-3, "ms")) if abs(value) >= s), (1e-6, "µs"))
            return f"{value / size:.3g} {name}"
        case "bytes" | "Bps" | "short" if abs(value) >= 1000:
            power = min(int(np.log10(abs(value)) // 3), 3)
            return f"{value / 1000**power:.3g} {('', 'k', 'M', 'G')[power]}{'' if unit == 'short' else 'B'}"
        case "ops":
            return f"{written(value, 'short')}/s"
        case "sci":
            return f"{value:.2e}"
    return f"{value:g}" if value == int(value) else f"{value:.3g}"


DRAWN: dict[str, Callable[[Axes, Json, Answers], None]] = {
    "stat": _number, "timeseries": _lines, "heatmap": _heat, "bargauge": _bars, "table": _table,
}  # fmt: skip
