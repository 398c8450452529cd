"""The report as one page that needs nothing but a browser: no network, light and dark."""

import base64
import gzip
import json
import math
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from gpt_core.files.writing import atomic_file
from parity.reports import summary
from parity.reports.figure_style import themes
from parity.reports.overview_figures import heat_map, noise_floor
from parity.reports.rendering import render
from parity.reports.variant_figures import variant_figures

_WORDS = ("headline", "missed", "noise_lines", "place", "rerun", "rerun_fault", "routing_lines", "why")
_FIGURES = {
    "depth": (
        "Error along depth",
        "JAX against PyTorch at every named site, in the order of the data's path. Points on the lower edge are "
        "exactly equal; crosses on the upper edge are not finite.",
    ),
    "noise": ("Noise along depth", "Each framework's RMS error against the fp64 truth, site by site."),
    "gradients": ("Gradients, leaf by leaf", "Leaves whose gradient is zero in theory are not compared, so not shown."),
    "optimizer": ("Optimizer, leaf by leaf", "Update deltas and moments after the last AdamW step."),
    "losses": (
        "Training",
        "Both loss curves (JAX wide and pale below, PyTorch thin above), and how far they are apart at each step; "
        "gaps are steps at which they are exactly equal.",
    ),
}


def write_html(content: dict[str, Any], destination: Path) -> None:
    """Write a report as a self-contained page.

    Args:
        content: What `report.json` holds; sections that are missing or empty are left out of the page.
        destination: The .html file.

    Raises:
        InputError: the file cannot be written.
    """
    drawn = _drawn(content)
    page = render(
        "report.html.jinja",
        content,
        _WORDS,
        {"margin_width": _margin_width},
        autoescape=True,
        tallies=_tallies(content),
        figures=_FIGURES,
        drawn=drawn,
        packed_drawn=_packed(json.dumps(drawn, allow_nan=False)),
        packed_plotly=_packed(get_plotlyjs()),
    )
    with atomic_file(destination) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _packed(text: str) -> str:
    """Gzipped and in base64, which the page undoes: a third of the size."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _drawn(content: dict[str, Any]) -> dict[str, Any]:
    """All that the page's script draws."""
    variants = {variant: variant_figures(content, variant) for variant in summary.variants_of(content)}
    failing = next((case["variant"] for case in summary.failed_cases(content)), None)
    overview = {"heat_map": heat_map(content), "noise_floor": noise_floor(content)}
    shown = [variant for variant, figures in variants.items() if figures]
    return {
        "themes": themes(),
        "overview": {name: figure for name, figure in overview.items() if figure is not None},
        "variants": {variant: variants[variant] for variant in shown},
        "first": failing if failing in shown else next(iter(shown), None),
    }


def _tallies(content: dict[str, Any]) -> list[dict[str, Any]]:
    """One tile a dtype: how many lines passed, and the one that came closest to its bound."""
    tallies = []
    for dtype in summary.dtypes_of(content):
        cases = [case for case in content["cases"] if case["dtype"] == dtype]
        closest = summary.worst(cases)
        assert closest is not None
        tallies.append(
            {
                "dtype": dtype,
                "passed": sum(case["passed"] for case in cases),
                "total": len(cases),
                "closest": closest,
                "share": summary.share_of_bound(closest),
            }
        )
    return tallies


def _margin_width(margin: Any) -> float:
    """Length of a margin's bar in percent: a power of ten is a sixteenth."""
    value = summary.number(margin)
    if math.isnan(value) or value <= 1:
        return 0.0
    return min(100.0, 100 * math.log10(value) / 16) if value < math.inf else 100.0
