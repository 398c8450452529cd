"""What `report.json` says, in the words that the page, the Markdown and the JUnit file share."""

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

Case = Mapping[str, Any]
Content = Mapping[str, Any]

CHECKS = (
    *("weights", "routing", "activations", "logits", "loss", "gradients", "balance", "optimizer", "training", "decode"),
    *("segments", "adapter", "chat"),
)
DTYPES = ("float64", "float32", "bfloat16")


def number(value: Any) -> float:
    """A number of the report, where "inf" and "nan" are strings; nan for one that is missing."""
    return math.nan if value is None else float(value)


def short(value: Any) -> str:
    """A number in few characters: "2.1e-15", "0", "inf", or "–" where there is none."""
    if value is None:
        return "–"
    found = number(value)
    if found == 0 or not math.isfinite(found):
        return f"{found:.0f}"
    if 0.01 <= abs(found) < 1000:
        return f"{found:.3g}"
    mantissa, exponent = f"{found:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def share_of_bound(case: Case) -> float:
    """Error over tolerance: 0 when equal, inf where nothing may differ and something does, or on NaN."""
    error, bound = number(case["relative_error"]), number(case["tolerance"])
    if error == 0:
        return 0.0
    if math.isnan(error) or bound == 0:
        return math.inf
    return error / bound


def worst(cases: Iterable[Case]) -> Case | None:
    """The case to show for several: one that failed before one that passed, then the largest share of its bound."""
    return max(cases, key=lambda case: (not case["passed"], share_of_bound(case)), default=None)


def ordered(found: Iterable[str], known: Sequence[str]) -> list[str]:
    """Names without repetition, the known ones first and in their order."""
    names = dict.fromkeys(found)
    return [name for name in known if name in names] + [name for name in names if name not in known]


def variants_of(content: Content) -> list[str]:
    """Variants in the order of the report."""
    return ordered((case["variant"] for case in content["cases"]), ())


def checks_of(cases: Iterable[Case]) -> list[str]:
    """Checks in the order of the data's path."""
    return ordered((case["check"] for case in cases), CHECKS)


def dtypes_of(content: Content) -> list[str]:
    """Dtypes, the most precise first."""
    return ordered((case["dtype"] for case in content["cases"]), DTYPES)


def cases_of(content: Content, variant: str, dtype: str, check: str) -> list[Case]:
    """The lines of one cell of the grid: one for each origin of the weights."""
    wanted = (variant, dtype, check)
    return [case for case in content["cases"] if (case["variant"], case["dtype"], case["check"]) == wanted]


def place(case: Case) -> str:
    """Which line of the report a case is."""
    origin = case.get("origin", "sharp")
    return " · ".join([case["variant"], case["dtype"], case["check"], *([] if origin == "sharp" else [origin])])


def missed(fault: Case) -> bool:
    """Whether a planted fault got through, anywhere."""
    return not fault["caught"] or bool(fault.get("missed_in"))


def failed_cases(content: Content) -> list[Case]:
    """Lines that failed, in the order of the report."""
    return [case for case in content["cases"] if not case["passed"]]


def missed_faults(content: Content) -> list[Case]:
    """Planted faults that no check caught."""
    return [fault for fault in content.get("faults", []) if missed(fault)]


def fault_line(faults: Sequence[Case]) -> str:
    """All faults in one line."""
    if not faults:
        return "faults: none planted"
    caught = sum(not missed(fault) for fault in faults)
    line = f"faults: {caught} of {len(faults)} caught"
    placed = [fault for fault in faults if fault.get("expected_site")]
    if placed:
        line += f", {sum(bool(fault.get('site_right')) for fault in placed)} of {len(placed)} at the right site"
    return line


def noise_lines(cases: Iterable[Case]) -> list[str]:
    """A line a dtype: how far the frameworks' distances from the fp64 truth are apart, and what explains it in fp32."""
    noisy = [case for case in cases if case["check"] == "logits" and "noise_ratio" in case]
    lines = []
    for dtype in ordered((case["dtype"] for case in noisy), DTYPES):
        ours = [case for case in noisy if case["dtype"] == dtype]
        closest = max(ours, key=lambda case: number(case["noise_ratio"]) / number(case.get("noise_allowed", 1)))
        errors = ", ".join(f"{name} {value:.1e}" for name, value in rms_errors(closest).items())
        allowed = f", {number(closest['noise_allowed']):.2f} allowed" if "noise_allowed" in closest else ""
        lines.append(
            f"noise of the logits against fp64, {dtype}: at most {number(closest['noise_ratio']):.2f} times the other "
            f"framework's{allowed} ({closest['variant']}: {errors}{_products(closest)})"
        )
    return lines


def routing_lines(cases: Iterable[Case]) -> list[str]:
    """A line a dtype: how many choices of experts differ where each side chooses by itself, and the first one."""
    routed = [case for case in cases if case["check"] == "routing" and "decisions" in case]
    lines = []
    for dtype in ordered((case["dtype"] for case in routed), DTYPES):
        ours = [case for case in routed if case["dtype"] == dtype]
        flips, decisions = (sum(case[name] for case in ours) for name in ("flips", "decisions"))
        text = f"choices of experts, {dtype}: {flips} of {decisions} differ ({flips / decisions:.1%})"
        first = next((case for case in ours if case["first_flip"]), None)
        margin = min(number(case["least_margin"]) for case in ours)
        if first is None and margin < math.inf:  # where every expert is chosen there is none
            text += f", by margins of {margin:.0e} at least"
        elif first is not None:
            text += f"; first in {first['variant']}: {first['first_flip']}"
        lines.append(text)
    return lines


def rms_errors(case: Case) -> dict[str, float]:
    """Side -> RMS error of its logits against the fp64 truth."""
    end = "_rms_error"
    return {name.removesuffix(end): number(value) for name, value in case.items() if name.endswith(end)}


def _products(case: Case) -> str:
    """How far each library's own products of the model's widths are from exact ones."""
    measured: Mapping[str, Mapping[str, Any]] = case.get("products", {})
    if not measured:
        return ""
    terms = " and ".join(f"{int(count):,}" for count in next(iter(measured.values())))
    sides = ", ".join(
        f"{name} {' and '.join(f'{number(error):.1e}' for error in errors.values())}"
        for name, errors in measured.items()
    )
    return f"; products of {terms} terms: {sides}"


def headline(content: Content) -> str:
    """The verdict in one line."""
    failed, total = len(failed_cases(content)), len(content["cases"])
    unseen = missed_faults(content)
    if content["passed"]:
        return f"all {total} checks passed"
    parts = [f"{failed} of {total} checks failed"] if failed else []
    if unseen:
        parts.append(f"{len(unseen)} planted fault{'s' if len(unseen) > 1 else ''} got through")
    return ", ".join(parts) or ("nothing was checked" if total == 0 else "the run failed")


def why(case: Case) -> str:
    """Why a line failed."""
    return case.get("reason") or f"relative error {short(case['relative_error'])} of {short(case['tolerance'])} allowed"


def rerun(case: Case, content: Content) -> str:
    """The command that runs one line again; the whole run's for what lies outside the grid."""
    if case["variant"] not in _variants_of_the_grid():
        return str(content.get("command", ""))
    command = ["parity", "check", *_depth(content), "--variant", case["variant"], "--dtype", case["dtype"]]
    return shlex.join([*command, *_planted(content), *_attention(content)])


def rerun_fault(fault: Case) -> str:
    """The command that plants one fault where it got through, or else in the first variant where it bites."""
    variants = [*(fault.get("missed_in") or []), *(fault.get("variants") or [])][:1]
    return shlex.join(["parity", "check", "--fault", fault["name"], *(["--variant", *variants] if variants else [])])


@cache
def _variants_of_the_grid() -> frozenset[str]:
    from parity.grid.variants import grid  # on demand: it brings the tokenizer

    return frozenset(case.variant for case in grid())


def _depth(content: Content) -> list[str]:
    return ["--full"] if "--full" in str(content.get("command", "")).split() else []


def _attention(content: Content) -> list[str]:
    words = str(content.get("command", "")).split()
    flags = [flag for flag in ("--jax-attention", "--torch-attention") if flag in words]
    return [word for flag in flags for word in words[words.index(flag) :][:2]]


def _planted(content: Content) -> list[str]:
    words = str(content.get("command", "")).split()
    return words[words.index("--fault") :][:2] if "--fault" in words else []
