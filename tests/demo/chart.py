"""A report as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ostinato.v1 import sequencer_pb2

COLOURS = ("#c0392b", "#2471a3", "#1e8449")


def draw(path: Path, settings: Sequence[tuple[str, sequencer_pb2.Stratum]]) -> None:
    """How divergence grows with company and with length, for each named setting; SVG, the same bytes for the same numbers."""
    mpl.rcParams.update({"svg.hashsalt": "ostinato", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9})
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    company, length = figure.subplots(1, 2)
    ticks: dict[int, str] = {}
    for number, (name, stratum) in enumerate(settings):
        label = f"{name}: {stratum.diverged} of {stratum.matched + stratum.diverged}"
        _company(company, stratum, label, COLOURS[number], number, ticks)
        _length(length, stratum, label, COLOURS[number])
    company.set(xlabel="runs in the engine", ylabel="answers that diverged, with 95 % bounds", ylim=(0, 1))
    length.set(xlabel="tokens", ylabel="answers still equal", ylim=(0, 1.02))
    company.set_xticks(list(ticks), list(ticks.values()))
    company.legend(frameon=False, loc="upper left")
    for axes in (company, length):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="svg", metadata={"Date": None})


def _company(axes: Axes, stratum: sequencer_pb2.Stratum, label: str, colour: str, number: int, ticks: dict[int, str]) -> None:
    shares = stratum.companies
    at = [share.first.bit_length() + 0.08 * number for share in shares]
    values = [share.rate.value for share in shares]
    below = [share.rate.value - share.rate.lower for share in shares]
    above = [share.rate.upper - share.rate.value for share in shares]
    for share in shares:
        ticks[share.first.bit_length()] = f"{share.first}" if share.first == share.last else f"{share.first}–{share.last}"
    axes.errorbar(at, values, yerr=[below, above], fmt="o-", capsize=3, color=colour, label=label)


def _length(axes: Axes, stratum: sequencer_pb2.Stratum, label: str, colour: str) -> None:
    spans = stratum.token_spans
    axes.step([span.first for span in spans], [span.equal_before for span in spans], where="post", color=colour, label=label)
