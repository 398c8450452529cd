"""How the report's figures look: colours of frameworks and dtypes, a light and a dark theme, axes."""

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

Figure = dict[str, Any]

# Mid tones: legible on white and on black.
COLORS = {
    "jax": "#3f8cf4",
    "torch": "#ee6a3b",
    "float64": "#17a37f",
    "float32": "#d6901f",
    "bfloat16": "#a06ee1",
}
GREY = "#8b949e"
DASHES = {"float64": "solid", "float32": "solid", "bfloat16": "dot"}
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def themes() -> dict[str, Figure]:
    """Plotly templates by name: "light" and "dark"."""
    return {
        "light": _theme("#1f2328", "#d9dee3", "#ffffff", ["#4fbd88", "#bfe6d0", "#f3f4f5", "#f6b9ab", "#ee6a57"]),
        "dark": _theme("#d7dce2", "#343b45", "#161a20", ["#178052", "#1c5a40", "#2a3039", "#7d3a32", "#c23f31"]),
    }


def log_axis(low: float, high: float) -> Figure:
    """A log axis with a handful of labels: powers of ten, or 1, 2, 5 where it spans less than two of them."""
    decades = math.log10(high) - math.log10(low)
    step = "D2" if decades < 2 else max(1, math.ceil(decades / 7))
    return {
        "type": "log",
        "range": [math.log10(low), math.log10(high)],
        "dtick": step,
        "tickformat": ".0e" if step == "D2" else "",
        "exponentformat": "power",
    }


def legend_on_top() -> Figure:
    """A legend in one row above the plot."""
    return {"orientation": "h", "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom"}


def edges(value: float, low: float, high: float) -> float:
    """Zero and what is not finite, which a log axis cannot hold, lie on its edges."""
    return low if value == 0 else value if math.isfinite(value) else high


def plain(figure: go.Figure) -> Figure:
    """Data and layout without Plotly's own default theme; the page adds one of `themes`."""
    found: Figure = figure.to_plotly_json()
    found["layout"].pop("template", None)
    return found


def _theme(text: str, lines: str, ground: str, colors: Sequence[str]) -> Figure:
    axis = {
        "gridcolor": lines,
        "linecolor": lines,
        "zeroline": False,
        "ticks": "",
        "dividercolor": lines,
        "dividerwidth": 1,
    }
    template = go.layout.Template(
        layout={
            "font": {"family": _FONT, "size": 12, "color": text},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": {"bgcolor": ground, "bordercolor": lines, "font": {"color": text}, "align": "left"},
            "coloraxis": {"colorscale": [[i / (len(colors) - 1), color] for i, color in enumerate(colors)]},
        },
        data={"heatmap": [{"textfont": {"color": text}}]},
    )
    found: Figure = template.to_plotly_json()
    return found
