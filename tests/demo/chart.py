"""A report as a picture for the docs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from ostinato.cli import charts
from ostinato.v1 import sequencer_pb2


def draw(path: Path, settings: Sequence[tuple[str, sequencer_pb2.Stratum]]) -> None:
    """The share that diverged by batch occupancy, for each named setting; SVG, the same bytes for the same numbers."""
    groups = {f"{name}: {each.diverged} of {each.matched + each.diverged} diverged": each for name, each in settings}
    with mpl.rc_context(charts.LOOK):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        charts.by_occupancy(axes, groups)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})
