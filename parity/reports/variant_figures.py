"""The figures of one variant: errors along depth and leaf by leaf, noise along depth, loss curves."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from parity.reports.figure_style import COLORS, DASHES, GREY, Figure, edges, legend_on_top, log_axis, plain
from parity.reports.summary import Content, cases_of, dtypes_of, number, short, worst

Series = dict[str, dict[str, float]]  # legend -> name -> value


def variant_figures(content: Content, variant: str) -> dict[str, Figure]:
    """The figures of one variant, by name; those without data are left out."""
    figures = {
        "depth": _along(content, variant, "activations", "sites"),
        "noise": _noise_along(content, variant),
        "gradients": _along(content, variant, "gradients", "leaves", joined=False),
        "optimizer": _along(content, variant, "optimizer", "leaves", joined=False),
        "losses": _losses(content, variant),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def _along(content: Content, variant: str, check: str, key: str, *, joined: bool = True) -> Figure | None:
    """Relative errors name by name, a colour a dtype, with each bound."""
    series: Series = {}
    bounds: dict[str, float] = {}
    for dtype in dtypes_of(content):
        case = worst(case for case in cases_of(content, variant, dtype, check) if case.get(key))
        if case is not None:
            series[dtype] = {name: number(value) for name, value in case[key].items()}
            bounds[dtype] = number(case["tolerance"])
    return _profile(series, "relative error", bounds, joined=joined)


def _noise_along(content: Content, variant: str) -> Figure | None:
    """RMS errors against the fp64 truth, site by site."""
    series: Series = {}
    for dtype in dtypes_of(content):
        case = worst(case for case in cases_of(content, variant, dtype, "activations") if case.get("noise"))
        if case is None:
            continue
        for index, framework in enumerate(("jax", "torch")):
            series[f"{framework} {dtype}"] = {site: number(pair[index]) for site, pair in case["noise"].items()}
    return _profile(series, "RMS error against fp64", {})


def _profile(series: Series, title: str, bounds: Mapping[str, float], *, joined: bool = True) -> Figure | None:
    """Values by name on a log axis, grouped by block; joined by a line where one follows from the other."""
    names = list(dict.fromkeys(name for values in series.values() for name in values))
    if not names:
        return None
    drawable = [value for values in series.values() for value in values.values() if 0 < value < math.inf]
    low, high = min(drawable, default=1e-16) / 10, max(drawable, default=1.0) * 10
    axis, longest = _category_axis(names)
    traces = []
    for legend, values in series.items():
        framework, dtype = legend.split()[0], legend.split()[-1]
        color = COLORS.get(framework, GREY)
        shown = [values.get(name) for name in names]
        symbols = ["circle" if value is None or math.isfinite(value) else "x" for value in shown]
        traces.append(
            go.Scatter(
                x=axis,
                y=[None if value is None else edges(value, low, high) for value in shown],
                name=legend,
                mode="lines+markers" if joined else "markers",
                line={"color": color, "dash": DASHES.get(dtype, "solid"), "width": 1.6},
                marker={"size": 6, "color": color, "symbol": symbols if "x" in symbols else "circle"},
                hovertext=[f"{html.escape(name)}<br>{legend}: {short(values.get(name))}" for name in names],
                hoverinfo="text",
            )
        )
    positive = {dtype: bound for dtype, bound in bounds.items() if bound > 0}
    traces += [_bound(axis, dtype, bound) for dtype, bound in positive.items()]
    seen = [low, high, *positive.values()]
    layout = {
        "height": 340 + 7 * longest,
        "margin": {"t": 40, "b": 10, "l": 70, "r": 10},
        "legend": legend_on_top(),
        "xaxis": {"tickangle": -90, "automargin": True, "showgrid": False},
        "yaxis": {"title": {"text": title}, **log_axis(min(seen) / 3, max(seen) * 3)},
    }
    return plain(go.Figure(traces, layout))


def _category_axis(names: Sequence[str]) -> tuple[list[Any], int]:
    """Plotly's x values for names, in two levels where they have groups; and the length of the longest label."""
    labels = [_group_and_leaf(name) for name in names]
    longest = max(len(leaf) for _, leaf in labels)
    if not any(group for group, _ in labels):
        return [leaf for _, leaf in labels], longest
    groups: list[str] = []
    for index, (group, _) in enumerate(labels):
        # Plotly would draw all that has no group as one group, before the blocks: each run gets a blank of its own.
        follows = index > 0 and not group and not labels[index - 1][0]
        groups.append(group or (groups[-1] if follows else " " * (index + 1)))
    return [groups, [leaf for _, leaf in labels]], longest


def _losses(content: Content, variant: str) -> Figure | None:
    """Both loss curves over each other, and below them how far they are apart."""
    cases = [
        case
        for dtype in dtypes_of(content)
        if (case := worst(case for case in cases_of(content, variant, dtype, "training") if case.get("losses")))
    ]
    if not cases:
        return None
    seen: list[float] = []
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.6, 0.4], vertical_spacing=0.05)
    for case in cases:
        curves = {name: [number(loss) for loss in losses] for name, losses in case["losses"].items()}
        for index, (name, losses) in enumerate(curves.items()):
            figure.add_trace(
                go.Scatter(
                    x=list(range(1, len(losses) + 1)),
                    y=[loss if math.isfinite(loss) else None for loss in losses],
                    name=f"{name} {case['dtype']}",
                    mode="lines",
                    line={
                        "color": COLORS.get(name, GREY),
                        "width": 1.8 if index else 6,
                        "dash": DASHES.get(case["dtype"], "solid"),
                    },
                    opacity=1 if index else 0.45,  # wide and pale below, thin above: both are seen where they are equal
                    hovertemplate=f"{name} {case['dtype']}, step %{{x}}: %{{y:.6f}}<extra></extra>",
                ),
                row=1,
                col=1,
            )
        a, b = curves.values()
        apart = [abs(x - y) / abs(y) if y else abs(x - y) for x, y in zip(a, b, strict=False)]
        seen += [value for value in (*apart, number(case["tolerance"])) if 0 < value < math.inf]
        figure.add_trace(
            go.Scatter(
                x=list(range(1, len(apart) + 1)),
                y=[value if 0 < value < math.inf else None for value in apart],
                name=f"apart {case['dtype']}",
                mode="lines+markers",
                marker={"size": 4},
                line={"color": COLORS.get(case["dtype"], GREY), "width": 1.2},
                hovertext=[
                    f"{case['dtype']}, step {step}: {short(value)} apart" for step, value in enumerate(apart, 1)
                ],
                hoverinfo="text",
            ),
            row=2,
            col=1,
        )
        if (bound := number(case["tolerance"])) > 0:
            figure.add_trace(_bound(list(range(1, len(apart) + 1)), case["dtype"], bound), row=2, col=1)
    seen = seen or [1e-16]
    figure.update_yaxes(title={"text": "loss"}, row=1, col=1)
    figure.update_yaxes(title={"text": "relative difference"}, **log_axis(min(seen) / 3, max(seen) * 3), row=2, col=1)
    figure.update_xaxes(title={"text": "step"}, row=2, col=1)
    figure.update_layout(height=460, margin={"t": 40, "b": 50, "l": 70, "r": 10}, legend=legend_on_top())
    return plain(figure)


def _bound(x: Sequence[Any], dtype: str, bound: float) -> go.Scatter:
    """A dashed line; Plotly's own horizontal lines misplace their labels on log axes."""
    return go.Scatter(
        x=x,
        y=[bound] * len(x[0] if isinstance(x[0], list) else x),
        mode="lines",
        name=f"bound {dtype}: {short(bound)}",
        line={"color": COLORS.get(dtype, GREY), "dash": "dash", "width": 1},
        hoverinfo="skip",
    )


def _group_and_leaf(name: str) -> tuple[str, str]:
    """Of a site, "blocks.0.attention.key": its block and the rest; of a moment, "mu of head.kernel": its kind and leaf.

    A name that has neither has no group.
    """
    kind, of, leaf = name.partition(" of ")
    if of:
        return kind, leaf
    words = name.split(".")
    for index, word in enumerate(words[:-1]):
        if word.isdigit():
            return ".".join(words[: index + 1]), ".".join(words[index + 1 :])
    return "", name
