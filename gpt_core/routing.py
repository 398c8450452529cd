"""The losses of a mixture's routers, and what is said of their routing; the same arithmetic on arrays of any framework.

With k experts a token chosen out of n by a softmax over the router's scores, in each layer, over the positions that
count (the mask) of the *whole step*, all devices, processes and micro-batches together:

    f_e = share of all assignments, k a position, that went to expert e; sums to 1, and no gradient flows through it
    P_e = mean probability of expert e, of the softmax over all n experts, taken once, in wide_dtype; sums to 1

    balance = mean over layers of  n * sum_e f_e P_e          1 when all experts are chosen alike, n when one is alone
    z       = mean over layers and positions of  logsumexp(scores)^2                       (ST-MoE, Zoph et al., 2022)

    total = cross entropy + train.balance_loss * balance + train.router_z_loss * z

The loss that is reported and evaluated stays the cross entropy: a mixture compares with a dense model.

Others define the balance loss otherwise:
- Switch (Fedus et al., 2021, eq. 4) is the same for k = 1, but of the tokens of each device by itself. The product is
  not linear in f: the mean over devices or micro-batches is another number, which pushes each of them to balance by
  itself, and a run would change with its hardware.
- Hugging Face (`load_balancing_loss_func`) takes mean f and mean P over all layers *before* the product, so that layers
  out of balance in opposite ways cancel, and adds f up over the k choices, so that balance is k and not 1: its
  `router_aux_loss_coef` c is a weight of c * k here, for one layer the same loss. It is of one micro-batch too.

f is known when the forward pass of the whole step is. With `train.accumulation` it is found by a pass without gradients
first; otherwise it costs a sum of counts over the devices.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol


class Routing(NamedTuple):
    """Sums over the counted positions of some rows. Those of several add up to those of all.

    Args:
        assigned: `[layers, experts]` how often an expert was chosen, whole numbers.
        probabilities: `[layers, experts]` of the softmax over all experts.
        squares: `[layers]` of the logsumexp of a position's scores.
        entropies: `[layers]` of the softmax, in nats.
    """

    assigned: Any
    probabilities: Any
    squares: Any
    entropies: Any


def added(routings: Iterable[Routing]) -> Routing:
    """Of several micro-batches together."""
    return Routing(*map(sum, zip(*routings, strict=True)))


class Weights(Protocol):
    """Of the losses; `TrainConfig` has them."""

    @property
    def balance_loss(self) -> float: ...

    @property
    def router_z_loss(self) -> float: ...


def expert_load(assigned: Any, count: Any, experts_per_token: int) -> Any:
    """f of every layer, `[layers, experts]`.

    Args:
        assigned: Of the whole step.
        count: Positions that count in it, at least 1.
        experts_per_token: k.
    """
    return assigned / (count * experts_per_token)


def summed_router_loss(routing: Routing, load: Any, weights: Weights) -> Any:
    """What the routers add to the total, summed over positions as the cross entropy is: to be divided by their number.

    Args:
        routing: Of some rows.
        load: f of the whole step.
        weights: Of both losses.
    """
    balance = load.shape[-1] * (load * routing.probabilities).sum(-1)  # [layers]
    return (weights.balance_loss * balance + weights.router_z_loss * routing.squares).mean()


def routing_metrics(routing: Routing, load: Any, count: Any) -> dict[str, Any]:
    """Both losses without their weights, and of each layer what a person looks at.

    Args:
        routing: Of the whole step.
        load: f of it.
        count: Positions that count in it, at least 1.

    Returns:
        `balance_loss`, `router_z_loss`; of each layer `router/balance_loss`, `router/z_loss`, `router/entropy` (mean in
        nats, log n at most) and `router/starved` (share of experts without a token); `router/load` is f.
    """
    experts = load.shape[-1]
    balance = experts * (load * routing.probabilities).sum(-1) / count  # [layers]
    z = routing.squares / count  # [layers]
    return {
        "balance_loss": balance.mean(),
        "router_z_loss": z.mean(),
        "router/balance_loss": balance,
        "router/z_loss": z,
        "router/entropy": routing.entropies / count,
        "router/starved": (routing.assigned == 0).sum(-1) / experts,
        LOAD: load,
    }


LOAD = "router/load"
