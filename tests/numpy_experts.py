"""Experts of a mixture in NumPy, one after the other, by hand: what both frameworks are held to."""

from typing import NamedTuple

import numpy as np


class Inputs(NamedTuple):
    """Tokens, their experts and weights, kernels `[experts, inputs, outputs]`, and a cotangent of the result."""

    x: np.ndarray
    chosen: np.ndarray
    weights: np.ndarray
    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray
    cotangent: np.ndarray


TRAFFIC = ("drawn", "starved", "one", "in turns")


def inputs(tokens: int, embed: int, expert_mlp: int, experts: int, per_token: int, traffic: str = "drawn") -> Inputs:
    """Tokens of which each goes to experts that are drawn; or none to the last two; or all to the same; or in turns."""
    random = np.random.default_rng(tokens)
    served = experts - 2 if traffic == "starved" else experts
    chosen = np.argsort(random.random((tokens, served)), axis=1)[:, :per_token]
    if traffic == "one":
        chosen = np.broadcast_to(chosen[:1], chosen.shape).copy()
    if traffic == "in turns":
        chosen = (np.arange(tokens)[:, None] + np.arange(per_token)) % experts
    shapes = [(experts, embed, expert_mlp), (experts, embed, expert_mlp), (experts, expert_mlp, embed)]
    return Inputs(
        random.normal(size=(tokens, embed)),
        chosen,
        random.uniform(0.1, 1, (tokens, per_token)),
        *(random.normal(size=shape) / np.sqrt(shape[1]) for shape in shapes),
        random.normal(size=(tokens, embed)),
    )


def outputs(given: Inputs) -> dict[str, np.ndarray]:
    """The weighted sum of SwiGLU experts, and the gradients of its product with the cotangent."""
    x, chosen, weights, gate, up, down, cotangent = given
    found = {name: np.zeros_like(array) for name, array in given._asdict().items() if name != "chosen"}
    for expert in range(len(up)):
        rows, places = np.nonzero(chosen == expert)
        share = weights[rows, places][:, None]
        g, u = x[rows] @ gate[expert], x[rows] @ up[expert]
        sigmoid = 1 / (1 + np.exp(-g))
        hidden = g * sigmoid * u
        y = hidden @ down[expert]
        np.add.at(found["cotangent"], rows, share * y)  # the result takes the place of its cotangent
        dy = share * cotangent[rows]
        found["weights"][rows, places] = (y * cotangent[rows]).sum(1)
        found["down"][expert] = hidden.T @ dy
        dhidden = dy @ down[expert].T
        dg, du = dhidden * u * (sigmoid + g * sigmoid * (1 - sigmoid)), dhidden * g * sigmoid
        found["gate"][expert], found["up"][expert] = x[rows].T @ dg, x[rows].T @ du
        np.add.at(found["x"], rows, dg @ gate[expert].T + du @ up[expert].T)
    return {"mixed": found.pop("cotangent"), **found}
