"""The checks: each module compares one thing between the twins and returns `CheckResult`s."""

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CheckResult:
    """One line of the report: one check of one variant in one dtype.

    Args:
        variant: Name of the case.
        dtype: What the twins computed in.
        check: Name of the check.
        relative_error: Largest relative error found.
        tolerance: The bound that it was held against.
        passed: The verdict; may fail on more than the bound.
        origin: Where the weights came from: "sharp", "jax" or "torch" (that framework's own initialisation).
        reason: Why it failed, for a person; "" when it passed.
        measures: Whatever else was measured.
    """

    variant: str
    dtype: str
    check: str
    relative_error: float
    tolerance: float
    passed: bool
    origin: str = "sharp"
    reason: str = ""
    measures: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Flat, for `report.json`; a number that JSON cannot hold becomes a string."""
        row = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "measures"}
        return {name: _json_number(value) for name, value in (row | self.measures).items()}


def _json_number(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
