"""Filling a template with what `report.json` says."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from parity.reports import summary


def render(
    template: str,
    content: Mapping[str, Any],
    words: Sequence[str],
    filters: Mapping[str, Callable[..., Any]],
    *,
    autoescape: bool,
    **more: Any,
) -> str:
    """The text of a template.

    Args:
        template: Its name in `templates/`.
        content: What `report.json` holds.
        words: Functions of `parity.reports.summary` that the template calls.
        filters: Its filters beside `short`.
        autoescape: Whether it is HTML.
        more: What else it shows.
    """
    environment = Environment(
        loader=PackageLoader("parity.reports"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update({name: getattr(summary, name) for name in words})
    environment.filters.update(short=summary.short, **filters)
    return environment.get_template(template).render(
        report=content,
        faults=content.get("faults", []),
        failed=summary.failed_cases(content),
        missed_faults=summary.missed_faults(content),
        descriptions=content.get("descriptions", {}),
        **more,
    )
