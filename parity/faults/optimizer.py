"""Mistakes of AdamW and of clipping."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from parity.faults.fault import Fault, Model, Plant, everywhere, having, norms, replacing

if TYPE_CHECKING:
    import torch


def _nothing_more(model: Model) -> list[Any]:
    return []


def every_parameter(model: Model) -> list[Any]:
    """All that a model learns."""
    return list(model.parameters())


def norm_scales(model: Model) -> list[Any]:
    """The scale of every norm."""
    return [norm.weight for norm in norms(model)]


def adamw(
    *,
    bias_correction: bool = True,
    coupled: bool = False,
    eps_in_root: bool = False,
    decayed: Callable[[Model], list[Any]] = _nothing_more,
) -> Plant:
    """A textbook AdamW with one mistake, in the place of the real one.

    Args:
        bias_correction: Of both moments.
        coupled: Whether decay goes into the gradient.
        eps_in_root: Whether eps stands under the root.
        decayed: What decays besides matrices.
    """

    def create(real: Any, config: Any, model: Model) -> Any:
        import torch

        more = set(decayed(model))

        class Mistaken(torch.optim.Optimizer):
            @torch.no_grad()
            def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure here
                for group in self.param_groups:
                    for p in group["params"]:
                        state = self.state[p]
                        if not state:
                            state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                        state["step"] += 1
                        decay = config.weight_decay if p in more else group["weight_decay"]
                        gradient = p.grad + decay * p if coupled else p.grad
                        mu = state["exp_avg"].lerp_(gradient, 1 - config.beta1)
                        nu = state["exp_avg_sq"].lerp_(gradient.square(), 1 - config.beta2)
                        if bias_correction:
                            mu = mu / (1 - config.beta1 ** state["step"])
                            nu = nu / (1 - config.beta2 ** state["step"])
                        root = (nu + config.eps).sqrt() if eps_in_root else nu.sqrt() + config.eps
                        p -= group["lr"] * (mu / root + (0 if coupled else decay) * p)

        groups = real(config, model).param_groups
        return Mistaken([{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups], {"lr": 0.0})

    return replacing("torch_gpt.optimizer.create_optimizer", create)


def clip_each_tensor(clip: Any, model: Model, limit: float) -> "torch.Tensor":
    """Each gradient clipped to the limit by its own norm."""
    import torch

    gradients = [parameter.grad for parameter in model.parameters()]
    norm = torch.nn.utils.get_total_norm(gradients)
    for gradient in gradients:
        gradient.mul_((limit / gradient.norm()).clamp(max=1.0))
    return norm


FAULTS = (
    Fault(
        "no-bias-correction",
        "Adam without bias correction, as in BERT's optimizer",
        "optimizer",
        everywhere,
        adamw(bias_correction=False),
    ),
    Fault(
        "decay-on-biases",
        "weight decay on every parameter; stacked biases look like matrices",
        "optimizer",
        everywhere,
        adamw(decayed=every_parameter),
    ),
    Fault(
        "decay-on-unit-offset",
        "weight decay on Gemma's norm scales, as if 0 were where they rest",
        "optimizer",
        having(norm_unit_offset=True),
        adamw(decayed=norm_scales),
    ),
    Fault(
        "coupled-decay",
        "L2 in the gradient (Adam) for decoupled decay (AdamW)",
        "optimizer",
        everywhere,
        adamw(coupled=True),
    ),
    Fault(
        "eps-inside-root",
        "sqrt(nu + eps) for sqrt(nu) + eps",
        "optimizer",
        everywhere,
        adamw(eps_in_root=True),
    ),
    Fault(
        "clip-per-tensor",
        "each gradient clipped by its own norm for the global one",
        "optimizer",
        everywhere,
        replacing("torch_gpt.optimizer.clip_gradients", clip_each_tensor),
    ),
)
