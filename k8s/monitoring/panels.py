"""Panels in one style, and what all dashboards share: variables, links and annotations.

In a query, ON stands for the selected jobs and instances, JOB for the selected jobs, and RATE for the range of a rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TypeAlias, TypeVar

from grafana_foundation_sdk.builders import bargauge, common, dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common as looks
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import heatmap as heat
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

Panel: TypeAlias = bargauge.Panel | heatmap.Panel | stat.Panel | table.Panel | timeseries.Panel
P = TypeVar("P", bargauge.Panel, heatmap.Panel, stat.Panel, table.Panel, timeseries.Panel)
Query: TypeAlias = tuple[str, str]
"""PromQL, and the legend of the series."""

SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
PLACEHOLDERS = {"ON": 'job=~"$job",instance=~"$instance"', "JOB": 'job=~"$job"', "RATE": "$__rate_interval"}
EVERY_JOB = '{__name__=~"ostinato_epoch|ostinato_service_grade"}'
GRADES = {"0": ("none", "red"), "1": ("BEST_EFFORT", "orange"), "2": ("SERIAL", "green"), "3": ("EXACT", "green")}
ALL = model.VariableOption(text="All", value="$__all")


@dataclass
class Board:
    """One dashboard."""

    name: str
    about: str
    rows: list[tuple[str, Sequence[Panel]]] = field(default_factory=list)

    def row(self, title: str, *panels: Panel) -> None:
        """Add a row. Its panels fill lines of 24 columns in the given order."""
        self.rows.append((title, panels))

    def build(self) -> model.Dashboard:
        made = (
            dashboard.Dashboard(f"Ostinato: {self.name}")
            .uid(f"ostinato-{self.name}")
            .description(self.about)
            .tags(["ostinato"])
            .refresh("30s")
            .time("now-1h", "now")
            .tooltip(model.DashboardCursorSync.CROSSHAIR)
            .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
            .with_variable(_variable("job", f"label_values({EVERY_JOB}, job)"))
            .with_variable(_variable("instance", f'label_values({EVERY_JOB[:-1]},job=~"$job"}}, instance)'))
            .annotation(_annotation("Epoch", "blue", "changes(ostinato_epoch{ON}[1m]) > 0"))
            .annotation(
                _annotation("Fingerprint", "purple", "ostinato_engine_info{ON} unless ostinato_engine_info{ON} offset 1m")
            )
            .link(
                dashboard.DashboardLink("Ostinato")
                .type(model.DashboardLinkType.DASHBOARDS)
                .tags(["ostinato"])
                .include_vars(True)
                .keep_time(True)
            )
        )
        ids = count(1)
        for title, panels in self.rows:
            made.with_row(dashboard.Row(title).id(next(ids)))
            for panel in panels:
                made.with_panel(panel.id(next(ids)))
        return made.build()


def total(metric: str) -> str:
    """A gauge's sum over the selected jobs and instances."""
    return f"sum(ostinato_{metric}{{ON}})"


def rate(metric: str, by: str = "") -> str:
    """A counter's rate, summed likewise, by these labels."""
    return f"sum{f' by ({by}) ' if by else ''}(rate(ostinato_{metric}{{ON}}[RATE]))"


def quantile(share: float, metric: str) -> str:
    """Of a histogram's recent observations."""
    return f"histogram_quantile({share}, sum by (le) (rate(ostinato_{metric}_bucket{{ON}}[RATE])))"


def lines(
    title: str, unit: str, *queries: Query, about: str = "", width: int = 8, steps: bool = False, exemplars: bool = False
) -> timeseries.Panel:
    """Series over time. Those whose legend ends in lower, upper or limit are dashed."""
    made = _panel(timeseries.Panel(), title, unit, queries, about, width, 8, exemplars=exemplars)
    dashes = looks.LineStyle(fill="dash", dash=[6, 4])
    made.override_by_regexp("/ (lower|upper|limit)$/", [model.DynamicConfigValue("custom.lineStyle", dashes)])
    made.fill_opacity(8).show_points(looks.VisibilityMode.NEVER).min(0)
    if steps:
        made.line_interpolation(looks.LineInterpolation.STEP_AFTER)
    return made


def number(
    title: str,
    unit: str,
    query: str,
    *colours: tuple[float | None, str],
    about: str = "",
    width: int = 4,
    names: dict[str, tuple[str, str]] | None = None,
) -> stat.Panel:
    """The newest value. `colours`: thresholds, the first of them None; `names`: value mappings."""
    made = _panel(stat.Panel(), title, unit, [(query, "")], about, width, 4, instant=True)
    made.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])).graph_mode(looks.BigValueGraphMode.NONE)
    if colours:
        made.thresholds(_thresholds(colours)).color_mode(looks.BigValueColorMode.BACKGROUND)
    if names:
        options = {value: model.ValueMappingResult(text=text, color=colour) for value, (text, colour) in names.items()}
        made.mappings([model.ValueMap(options=options)]).color_mode(looks.BigValueColorMode.BACKGROUND)
    return made


def heat_map(title: str, unit: str, metric: str, about: str = "", width: int = 8) -> heatmap.Panel:
    """A histogram over time."""
    query = (f"sum by (le) (increase({metric}_bucket{{ON}}[RATE]))", "{{le}}")
    made = _panel(heatmap.Panel(), title, "short", [query], about, width, 8, buckets=True)
    colours = heatmap.HeatmapColorOptions().mode(heat.HeatmapColorMode.SCHEME).scheme("Blues").steps(32)
    return made.calculate(False).y_axis(heatmap.YAxisConfig().unit(unit)).color(colours)


def bars(title: str, unit: str, query: str, legend: str, about: str) -> bargauge.Panel:
    """A histogram: the count in each bucket."""
    made = _panel(bargauge.Panel(), title, unit, [(query, legend)], about, 8, 8, instant=True, buckets=True)
    return made.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])).orientation(looks.VizOrientation.VERTICAL)


def rows(title: str, query: str) -> table.Panel:
    """The labels of the current series."""
    return _panel(table.Panel(), title, "none", [(query, "")], "", 12, 6, instant=True, as_table=True)


def limit(panel: timeseries.Panel, value: float) -> timeseries.Panel:
    """A dashed line across the panel."""
    style = common.GraphThresholdsStyleConfig().mode(looks.GraphThresholdsStyleMode.DASHED)
    return panel.thresholds(_thresholds([(None, "transparent"), (value, "red")])).thresholds_style(style)


def _panel(
    made: P,
    title: str,
    unit: str,
    queries: Sequence[Query],
    about: str,
    width: int,
    height: int,
    *,
    instant: bool = False,
    exemplars: bool = False,
    buckets: bool = False,
    as_table: bool = False,
) -> P:
    made.title(title).unit(unit).description(about).datasource(SOURCE).span(width).height(height)
    for place, (query, legend) in enumerate(queries):
        target = prometheus.Dataquery().expr(_expanded(query)).legend_format(legend).ref_id(chr(ord("A") + place))
        target = target.instant() if instant else target.range()
        if exemplars:
            target.exemplar(True)
        if buckets or as_table:
            target.format(PromQueryFormat.HEATMAP if buckets else PromQueryFormat.TABLE)
        made.with_target(target)
    return made


def _expanded(query: str) -> str:
    for word, text in PLACEHOLDERS.items():
        query = query.replace(f"{{{word}", f"{{{text}").replace(f"[{word}]", f"[{text}]")
    return query


def _thresholds(steps: Sequence[tuple[float | None, str]]) -> dashboard.ThresholdsConfig:
    return (
        dashboard.ThresholdsConfig()
        .mode(model.ThresholdsMode.ABSOLUTE)
        .steps([model.Threshold(value, colour) for value, colour in steps])
    )


def _variable(name: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(name.capitalize())
        .datasource(SOURCE)
        .query(query)
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(ALL)
    )


def _annotation(name: str, colour: str, query: str) -> dashboard.AnnotationQuery:
    made = dashboard.AnnotationQuery().name(name).datasource(SOURCE).enable(True).icon_color(colour)
    return made.expr(_expanded(query))
