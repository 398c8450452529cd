"""The figures of a whole run: every check of every variant, and the noise floor."""

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from parity.reports.figure_style import COLORS, GREY, Figure, legend_on_top, log_axis, plain
from parity.reports.summary import (
    Case,
    Content,
    cases_of,
    checks_of,
    dtypes_of,
    place,
    rms_errors,
    share_of_bound,
    short,
    variants_of,
    why,
    worst,
)

_FAR = 4.0  # powers of ten from the bound at which the heat map's colours end
_MINUS = "\N{MINUS SIGN}"


def heat_map(content: Content) -> Figure | None:
    """Variants x checks, a panel a dtype: log10 of error over tolerance, the worst of each cell's lines."""
    variants, dtypes = variants_of(content), dtypes_of(content)
    if not content["cases"]:
        return None
    columns = {dtype: checks_of(case for case in content["cases"] if case["dtype"] == dtype) for dtype in dtypes}
    figure = make_subplots(
        rows=1,
        cols=len(dtypes),
        shared_yaxes=True,
        horizontal_spacing=0.015,
        column_widths=[len(columns[dtype]) for dtype in dtypes],
    )
    for column, dtype in enumerate(dtypes, start=1):
        cells = [[cases_of(content, variant, dtype, check) for check in columns[dtype]] for variant in variants]
        figure.add_trace(
            go.Heatmap(
                x=columns[dtype],
                y=variants,
                z=[[_heat(cell) for cell in row] for row in cells],
                text=[[_cell_text(cell) for cell in row] for row in cells],
                hovertext=[[_cell_hover(cell) for cell in row] for row in cells],
                texttemplate="%{text}",
                hoverinfo="text",
                hoverongaps=False,
                xgap=2,
                ygap=2,
                coloraxis="coloraxis",
            ),
            row=1,
            col=column,
        )
        figure.update_xaxes(
            title={"text": f"<b>{dtype}</b>", "standoff": 6}, side="top", tickangle=-40, row=1, col=column
        )
    figure.update_xaxes(showgrid=False, showline=False, fixedrange=True)
    figure.update_yaxes(showgrid=False, showline=False, fixedrange=True, autorange="reversed", automargin=True)
    ticks = {
        -_FAR: f"≤ 10<sup>{_MINUS}{_FAR:.0f}</sup> of it",
        -2: f"10<sup>{_MINUS}2</sup>",
        0: "the bound",
        2: "10<sup>2</sup>",
        _FAR: f"≥ 10<sup>{_FAR:.0f}</sup> times",
    }
    figure.update_layout(
        height=150 + 26 * len(variants) + 70,
        margin={"t": 120, "b": 70, "l": 10, "r": 10},
        coloraxis={
            "cmin": -_FAR,
            "cmax": _FAR,
            "colorbar": {
                "orientation": "h",
                "y": 0,
                "yref": "container",
                "yanchor": "bottom",
                "thickness": 10,
                "len": 0.6,
                "outlinewidth": 0,
                "tickvals": list(ticks),
                "ticktext": list(ticks.values()),
            },
        },
    )
    return plain(figure)


def noise_floor(content: Content) -> Figure | None:
    """RMS error of the logits against the fp64 truth, of each framework, a panel a dtype."""
    found = [(case, rms_errors(case)) for case in content["cases"] if case["check"] == "logits" and rms_errors(case)]
    dtypes = [dtype for dtype in dtypes_of(content) if any(case["dtype"] == dtype for case, _ in found)]
    if not dtypes:
        return None
    variants = [variant for variant in variants_of(content) if any(case["variant"] == variant for case, _ in found)]
    figure = make_subplots(rows=1, cols=len(dtypes), shared_yaxes=True, horizontal_spacing=0.03)
    for column, dtype in enumerate(dtypes, start=1):
        rows = [(case["variant"], noise, case) for case, noise in found if case["dtype"] == dtype]
        bars: dict[str, list[Any]] = {"x": [], "y": []}
        for variant, noise, _ in rows:
            bars["x"] += [_positive(value) for value in (min(noise.values()), max(noise.values()))] + [None]
            bars["y"] += [variant, variant, None]
        figure.add_trace(
            go.Scatter(**bars, mode="lines", line={"color": GREY, "width": 2}, hoverinfo="skip", showlegend=False),
            row=1,
            col=column,
        )
        for index, name in enumerate(dict.fromkeys(name for _, noise, _ in rows for name in noise)):
            color = COLORS["torch" if "torch" in name or (index and "jax" not in name) else "jax"]
            mine = [(variant, noise, case) for variant, noise, case in rows if name in noise]
            figure.add_trace(
                go.Scatter(
                    x=[_positive(noise[name]) for _, noise, _ in mine],
                    y=[variant for variant, _, _ in mine],
                    mode="markers",
                    name=name,
                    legendgroup=name,
                    showlegend=column == 1,
                    marker={"size": 9, "color": color, "symbol": "diamond" if index else "circle"},
                    hovertext=[_noise_hover(case, noise) for _, noise, case in mine],
                    hoverinfo="text",
                ),
                row=1,
                col=column,
            )
        drawn = [value for _, noise, _ in rows for value in noise.values() if 0 < value < math.inf] or [1.0]
        title = {"text": f"RMS error against fp64, {dtype}", "standoff": 8}
        figure.update_xaxes(title=title, **log_axis(min(drawn) / 2, max(drawn) * 2), row=1, col=column)
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_layout(
        height=130 + 24 * len(variants), margin={"t": 40, "b": 60, "l": 10, "r": 20}, legend=legend_on_top()
    )
    return plain(figure)


def _heat(cell: Sequence[Case]) -> float | None:
    """log10 of error over tolerance within the colours' range; what failed for another reason than its bound is red."""
    case = worst(cell)
    if case is None:
        return None
    share = share_of_bound(case)
    heat = -_FAR if share == 0 else min(max(math.log10(share), -_FAR), _FAR)
    return heat if case["passed"] else max(heat, _FAR / 2)


def _cell_text(cell: Sequence[Case]) -> str:
    case = worst(cell)
    if case is None:
        return ""
    share = share_of_bound(case)
    text = "=" if share == 0 else "∞" if share == math.inf else f"{math.log10(share):.1f}".replace("-", _MINUS)
    return text if case["passed"] else f"✗ {text}"


def _cell_hover(cell: Sequence[Case]) -> str:
    lines = []
    for case in cell:
        lines.append(f"<b>{html.escape(place(case))}</b>")
        lines.append(f"error {short(case['relative_error'])} of {short(case['tolerance'])} allowed")
        measured = [f"{name} {short(case[name])}" for name in ("noise_ratio", "kl", "cosine") if name in case]
        lines += [", ".join(measured)] if measured else []
        if not case["passed"]:
            lines += [html.escape(line) for line in textwrap.wrap(f"FAILED: {why(case)}", 90)]
    return "<br>".join(lines)


def _noise_hover(case: Case, noise: Mapping[str, float]) -> str:
    values = ", ".join(f"{html.escape(name)} {short(value)}" for name, value in noise.items())
    allowed = f" of {short(case['noise_allowed'])} allowed" if "noise_allowed" in case else ""
    return f"<b>{html.escape(place(case))}</b><br>{values}<br>ratio {short(case.get('noise_ratio'))}{allowed}"


def _positive(value: float) -> float | None:
    return value if 0 < value < math.inf else None
