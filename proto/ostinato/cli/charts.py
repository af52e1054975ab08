"""Charts of a divergence report. Imports matplotlib, an extra; `report` loads this module when it writes a page.

Each function draws one chart of several groups of comparisons, by their names.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ostinato.cli import show
from ostinato.v1.sequencer_pb2 import CompanyShare, Rate, Stratum, TimeShare

COLOURS = ("#2f6fde", "#d9822b", "#2a9d72", "#8e5bd0", "#c23b5a", "#3a8fa3", "#7a7f35", "#5a6675")
SPREAD = 0.3
"""Part of the distance between two ticks over which the points of all groups are spread."""
# Letters are drawn as paths: a chart looks the same where its font is not installed.
LOOK: Any = {"svg.fonttype": "path", "svg.hashsalt": "ostinato", "font.family": "sans-serif", "font.size": 9}
INCHES = (10.0, 3.4)

Draw = Callable[[Axes, Mapping[str, Stratum]], None]


def svg(draw: Draw, groups: Mapping[str, Stratum]) -> str:
    """A chart as an SVG element."""
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=INCHES, layout="constrained")
        draw(figure.subplots(), groups)
        figure.legend(loc="outside lower left", ncols=2, frameon=False)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    element = re.sub(r"^.*?(?=<svg)", "", written.getvalue(), count=1, flags=re.DOTALL)
    return re.sub(r"\s*<metadata>.*?</metadata>", "", element, count=1, flags=re.DOTALL)


def by_occupancy(axes: Axes, groups: Mapping[str, Stratum]) -> None:
    """The share that diverged, by batch occupancy: ticks ascending, "not known" last."""
    buckets = {_bucket(share): show.occupancy(share) for stratum in groups.values() for share in stratum.companies}
    places = {bucket: place for place, bucket in enumerate(sorted(buckets))}
    for number, (name, stratum) in enumerate(groups.items()):
        shift = SPREAD * ((number + 0.5) / len(groups) - 0.5)
        at = [places[_bucket(share)] + shift for share in stratum.companies]
        _points(axes, number, name, at, [share.rate for share in stratum.companies])
    axes.set_xticks(list(places.values()), [buckets[bucket] for bucket in places])
    axes.set(xlabel="batch occupancy (runs in the engine)", ylabel="diverged", xlim=(-0.6, max(len(places), 1) - 0.4))
    _percent(axes)


def by_time(axes: Axes, groups: Mapping[str, Stratum]) -> None:
    """The share that diverged, over time (UTC)."""
    for number, (name, stratum) in enumerate(groups.items()):
        times: Sequence[TimeShare] = stratum.times
        at = [datetime.fromtimestamp(share.time_unix_millis / 1000, UTC) for share in times]
        _points(axes, number, name, at, [share.rate for share in times])
    axes.set(xlabel="time (UTC)", ylabel="diverged")
    axes.margins(x=0.1)
    for label in axes.get_xticklabels():
        label.set(rotation=20, horizontalalignment="right")
    _percent(axes)


def _points(axes: Axes, number: int, name: str, at: Sequence[float | datetime], rates: Iterable[Rate]) -> None:
    rates = list(rates)
    whiskers = [
        [max(0.0, rate.value - rate.lower) for rate in rates],
        [max(0.0, rate.upper - rate.value) for rate in rates],
    ]
    values, colour = [rate.value for rate in rates], COLOURS[number % len(COLOURS)]
    axes.errorbar(at, values, yerr=whiskers, fmt="none", ecolor=colour, capsize=3, linewidth=1)  # type: ignore[arg-type]
    axes.plot(at, values, "o", color=colour, label=name, gid=f"points-{number}", clip_on=False)  # type: ignore[arg-type]


def _bucket(share: CompanyShare) -> tuple[bool, int]:
    """Sorts by occupancy; 0, not known, is last."""
    return share.first == 0, share.first


def _percent(axes: Axes) -> None:
    top = axes.get_ylim()[1]
    axes.set_ylim(0, min(1.02, max(top, 0.01)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e8ed", linewidth=0.7)
    axes.set_axisbelow(True)
