"""Our models against a third party that reads the same folder: from intermediates to generated tokens."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from gpt_core.config import ModelConfig
from parity.checks import CheckResult
from parity.checks.activations import check_activations
from parity.checks.gradients import check_gradients
from parity.checks.logits import check_logits
from parity.checks.loss import check_loss
from parity.checks.noise import allowance, excuse
from parity.checks.routing import check_routing
from parity.comparison.divergence import first_divergence
from parity.comparison.measures import Array, difference
from parity.comparison.routing import Settled, routed_blocks, settled_logits
from parity.comparison.tolerances import PEER_NOISE_RATIO, tolerance
from parity.sides.products import Libraries
from parity.sides.runs import Run

PEER = "transformers"


def check_runs(
    variant: str,
    dtype: str,
    config: ModelConfig,
    name: str,
    ours: Run,
    peer: Run,
    truth: Run | None,
    libraries: Libraries | None = None,
) -> list[CheckResult]:
    """Compare one run of ours with one of the peer's, on the sites that the peer has.

    Args:
        variant: Name of the case.
        dtype: What both were computed in.
        config: The model.
        name: Of our side.
        ours: Our run.
        peer: The reference.
        truth: The peer's run in fp64; given, our error against it may be `PEER_NOISE_RATIO` times its own, or what
            `noise_allowed` says of the two libraries.
        libraries: What each side's library can do in fp32; None where it was not measured.
    """
    order = [site for site in ours.sites if site in peer.sites]
    sites: dict[str, Mapping[str, Array]] = {
        name: {site: ours.sites[site] for site in order},
        PEER: {site: peer.sites[site] for site in order},
    }
    results, flipped = list[CheckResult](), False
    if routed_blocks(sites[PEER]):
        results.append(check_routing(variant, dtype, sites))
        flipped = results[0].passed and results[0].measures["flips"] > 0
        sites[name] = Settled(sites[name], sites[PEER], dtype)
    divergence = first_divergence(sites[name], sites[PEER], order, tolerance("activations", dtype))
    runs = [ours, peer, *([] if truth is None else [truth])]
    of_ours, of_peer, *exact = settled_logits([run.logits for run in runs], [run.sites for run in runs], dtype)
    logits = {name: of_ours, PEER: of_peer}
    compared = check_logits(variant, dtype, logits)
    results += [
        check_activations(variant, dtype, sites, divergence=divergence),
        _held_to_truth(compared, logits, exact[0], libraries) if exact else compared,
    ]
    if not flipped:  # or it is that of another function
        results.append(check_loss(variant, dtype, {name: ours.loss, PEER: peer.loss}))
    if ours.gradients and not flipped:
        gradients = {name: ours.gradients, PEER: peer.gradients}
        results.append(check_gradients(variant, dtype, config, gradients, forward_differs=divergence is not None))
    return results


def _held_to_truth(
    result: CheckResult, logits: Mapping[str, Array], truth: Array, libraries: Libraries | None
) -> CheckResult:
    if not np.isfinite(result.relative_error):
        return result
    noise = {side: difference(own, truth).rms for side, own in logits.items()}
    name = next(iter(logits))
    ratio = noise[name] / noise[PEER] if noise[PEER] else (1.0 if not noise[name] else np.inf)
    bound = allowance(name, PEER, libraries, PEER_NOISE_RATIO)
    measures = result.measures | {f"{side}_rms_error": value for side, value in noise.items()}
    measures |= {"noise_ratio": ratio} | bound
    if ratio <= bound["noise_allowed"]:
        return replace(result, measures=measures)
    reason = f"{name} is {ratio:.1f} times as far from {PEER}' formulas in fp64 as {PEER} is in {result.dtype}"
    reason = f"{reason}, {excuse(bound)}"
    reason = "; ".join(filter(None, (result.reason, reason)))
    return replace(result, measures=measures, passed=False, reason=reason)


def check_decode(
    variant: str,
    dtype: str,
    ours: Array,
    peer: Array,
    gap: Callable[[int, int], float],
    peer_settings: Mapping[str, Any] | None = None,
) -> CheckResult:
    """Compare generated tokens `[batch, new]`, one by one.

    Args:
        variant: Name of the case.
        dtype: What both were computed in.
        ours: Greedy decoding with our cache.
        peer: The peer's, with its cache.
        gap: By how much our two best logits differ at a row and a token, to tell a tie from a mistake.
        peer_settings: How the peer generated where it is not as its folder says, for the report.
    """
    wrong = np.argwhere(ours != peer)
    reason, measures = "", {"tokens": ours.shape[1], "rows": ours.shape[0], **(peer_settings or {})}
    if len(wrong):
        row, token = min(wrong.tolist(), key=lambda place: place[1])
        reason = (
            f"row {row} parts at token {token + 1} of {ours.shape[1]}: {ours[row, token]} against {peer[row, token]}; "
            f"our best two logits differ by {gap(row, token):.1e}"
        )
    share = len(wrong) / ours.size
    return CheckResult(variant, dtype, "decode", share, 0.0, passed=not len(wrong), reason=reason, measures=measures)


def gap_at(logits_of: Callable[[Array], Array], prompt: Array, written: Array, row: int, token: int) -> float:
    """By how much the best two logits differ where a token was written, by a run without a cache.

    Args:
        logits_of: Token ids `[batch, time]` to logits `[batch, time, vocab]`.
        prompt: `[batch, time]`.
        written: What came behind it, `[batch, new]`.
        row: Of the token.
        token: Its number in `written`.
    """
    text = np.concatenate([prompt, written], axis=1)
    second, best = np.sort(logits_of(text)[row, prompt.shape[1] + token - 1])[-2:]
    return float(best - second)


def verdict(results: list[CheckResult]) -> str:
    """One line for a model card."""
    failed = [result for result in results if not result.passed]
    errors: Mapping[str, Any] = {
        result.dtype: result.relative_error
        for result in sorted(results, key=lambda result: result.relative_error)
        if result.check == "logits"
    }
    logits = ", ".join(f"{error:.0e} in {dtype}" for dtype, error in errors.items())
    passed = f"{len(results) - len(failed)} of {len(results)} checks against {PEER} passed (`parity verify`)"
    return f"{'FAILED: ' if failed else ''}{passed}; largest relative error of logits: {logits}"
