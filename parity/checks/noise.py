"""The judge of fp32: how far each side is from the fp64 truth, beside what its library can do."""

import math
from collections.abc import Mapping
from typing import Any

from parity.comparison.measures import Array, difference
from parity.comparison.tolerances import NOISE_RATIO, noise_allowed
from parity.sides.products import Libraries


def noise_against(
    truth: Array, sides: Mapping[str, Array], dtype: str, libraries: Libraries | None
) -> tuple[dict[str, Any], str]:
    """Each side's RMS error against the fp64 truth, their ratio and its bound; and what of it fails in fp32, or ""."""
    noise = {name: difference(side, truth).rms for name, side in sides.items()}
    quieter, noisier = sorted(noise, key=lambda name: noise[name])
    judged, reason = judge(_ratio(noise[noisier], noise[quieter]), noisier, quieter, dtype, libraries)
    return {f"{name}_rms_error": value for name, value in noise.items()} | judged, reason


def _ratio(noisier: float, quieter: float) -> float:
    """1 where both are exact, infinite where one alone is."""
    if noisier == quieter:
        return 1.0
    return noisier / quieter if quieter else math.inf


def judge(
    ratio: float, noisier: str, quieter: str, dtype: str, libraries: Libraries | None
) -> tuple[dict[str, Any], str]:
    """The ratio of two sides' noise and its bound, which fp32 alone has; and what fails, or "".

    bf16 has none: the places where a model rounds to 8 bits make its noise, not how a library adds up in fp32.
    """
    if dtype != "float32":
        return {"noise_ratio": ratio}, ""
    bound = allowance(noisier, quieter, libraries)
    measures = {"noise_ratio": ratio} | bound
    if ratio <= bound["noise_allowed"]:
        return measures, ""
    return measures, f"{noisier} is {ratio:.1f} times as far from the fp64 truth as {quieter}, {excuse(bound)}"


def allowance(noisier: str, quieter: str, libraries: Libraries | None, ratio: float = NOISE_RATIO) -> dict[str, Any]:
    """How many times as far from the truth a side may be, and what each library's products measured.

    Args:
        noisier: The side.
        quieter: The other.
        libraries: Side -> what its library can do; None where nothing was measured.
        ratio: What is allowed whatever the libraries do.
    """
    if libraries is None:
        return {"noise_allowed": ratio}
    own, other = libraries[noisier].model, libraries[quieter].model
    return {
        "noise_allowed": noise_allowed(own, other, ratio),
        "library_ratio": own / other,
        "products": {name: library.to_dict()["products"] for name, library in sorted(libraries.items())},
    }


def excuse(bound: Mapping[str, Any]) -> str:
    """An allowance for people."""
    measured = f"; its library's products: {bound['library_ratio']:.2f} times" if "library_ratio" in bound else ""
    return f"and {bound['noise_allowed']:.2f} times is allowed{measured}"
