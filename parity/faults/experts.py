"""Mistakes of a mixture of experts: its router, its choice, its weights, and which expert is which."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gpt_core.config import ModelConfig
from parity.faults.fault import Fault, Model, Plant, in_model, replacing

if TYPE_CHECKING:
    import torch

_CHOSEN, _WEIGHTS, _OUTPUT = (f"blocks.0.moe.{part}" for part in ("chosen", "weights", "output"))


def lowest_scores(route: Any, scores: "torch.Tensor", config: ModelConfig) -> Any:
    """The experts with the lowest scores."""
    chosen, _ = route(-scores, config)
    best = scores.take_along_dim(chosen, dim=-1)
    return chosen, best.softmax(-1) if config.router_normalise else _among_all(scores, chosen)


def one_expert_fewer(route: Any, scores: "torch.Tensor", config: ModelConfig) -> Any:
    """A token is sent to one expert fewer."""
    return route(scores, replace(config, experts_per_token=config.experts_per_token - 1))


def biased_choice(route: Any, scores: "torch.Tensor", config: ModelConfig) -> Any:
    """A bias on the scores that decides, and has no part in the weights."""
    import torch

    bias = torch.linspace(-0.5, 0.5, config.n_experts, dtype=scores.dtype, device=scores.device)
    chosen, _ = route(scores + bias, config)
    best = scores.take_along_dim(chosen, dim=-1)
    return chosen, best.softmax(-1) if config.router_normalise else _among_all(scores, chosen)


def of_all_experts(route: Any, scores: "torch.Tensor", config: ModelConfig) -> Any:
    """Probabilities among all experts as weights."""
    return route(scores, replace(config, router_normalise=False))


def of_chosen_experts(route: Any, scores: "torch.Tensor", config: ModelConfig) -> Any:
    """Weights of the chosen experts that sum to one."""
    return route(scores, replace(config, router_normalise=True))


def sigmoid_weights(route: Any, scores: "torch.Tensor", config: ModelConfig) -> Any:
    """A sigmoid of each score for the softmax of all."""
    chosen, _ = route(scores, config)
    weights = scores.sigmoid().take_along_dim(chosen, dim=-1)
    return chosen, weights / weights.sum(-1, keepdim=True) if config.router_normalise else weights


def detached_weights(route: Any, scores: "torch.Tensor", config: ModelConfig) -> Any:
    """Weights that are cut out of the graph, as the choice is."""
    chosen, weights = route(scores, config)
    return chosen, weights.detach()


def softmax_of_probabilities(routing_of: Any, taps: Any, mask: "torch.Tensor", config: ModelConfig) -> Any:
    """The balance loss by probabilities that went through the softmax once more."""
    twice = {site: value.softmax(-1) if site.endswith("scores") else value for site, value in taps.items()}
    found: Any = routing_of(taps, mask, config)
    return found._replace(probabilities=routing_of(twice, mask, config).probabilities)


def load_of_a_part(loss: Any, routing: Any, load: "torch.Tensor", weights: Any) -> "torch.Tensor":
    """The balance loss by the load of a micro-batch, for that of the whole step."""
    own: "torch.Tensor" = loss(routing, routing.assigned / routing.assigned.sum(-1, keepdim=True), weights)
    return own


def _among_all(scores: "torch.Tensor", chosen: "torch.Tensor") -> "torch.Tensor":
    return scores.softmax(-1).take_along_dim(chosen, dim=-1)


def bf16_router(model: Model) -> None:
    """A router that computes in bf16."""
    import torch
    from torch.nn.functional import linear

    for block in model.blocks:
        router = block.moe.router
        router.forward = lambda x, router=router: linear(x.bfloat16(), router.weight.to(torch.bfloat16)).to(x.dtype)


def experts_by_name(model: Model) -> None:
    """Kernels of expert 10 where those of expert 2 belong."""
    for block in model.blocks:
        order = sorted(range(block.moe.config.n_experts), key=str)
        for bank in (block.moe.gate, block.moe.up, block.moe.down):
            bank.weight.data = bank.weight.data[order]


def swapped_w1_and_w3(model: Model) -> None:
    """The activation on what it should be multiplied by."""
    for block in model.blocks:
        block.moe.gate, block.moe.up = block.moe.up, block.moe.gate


def weights_on_inputs(
    experts: Any, x: "torch.Tensor", chosen: "torch.Tensor", weights: "torch.Tensor", *more: Any
) -> "torch.Tensor":
    """Each expert reads the token times its weight, and its output is added as it is."""
    import torch

    whole = torch.ones_like(weights[:, :1])
    scaled = [x * weight[:, None].to(x.dtype) for weight in weights.unbind(1)]
    return torch.stack(
        [experts(read, expert[:, None], whole, *more) for read, expert in zip(scaled, chosen.unbind(1), strict=True)]
    ).sum(0)


def with_capacity(
    experts: Any, x: "torch.Tensor", chosen: "torch.Tensor", weights: "torch.Tensor", kernels: Any, activate: Any
) -> "torch.Tensor":
    """An expert takes as many tokens as each would have if all had the same; who comes later is dropped."""
    from torch.nn.functional import one_hot

    taken = one_hot(chosen.flatten(), len(kernels.up))  # [copies, experts]
    before = (taken.cumsum(0) * taken).sum(-1) - 1
    room = -(-len(taken) // len(kernels.up))
    kept = (before < room).view_as(chosen)
    mixed: "torch.Tensor" = experts(x, chosen, weights * kept, kernels, activate)
    return mixed


def _around_experts(wrap: Any) -> Plant:
    def change(model: Model) -> None:
        for block in model.blocks:
            experts = block.moe.experts
            block.moe.experts = lambda *given, experts=experts: wrap(experts, *given)

    return in_model(change)


def _routing(wrap: Any) -> Plant:
    return replacing("torch_gpt.moe.route", wrap)


def mixtures(config: ModelConfig) -> bool:
    """Models with experts, some of which a token is not sent to."""
    return config.experts_per_token < config.n_experts


def _of_several(config: ModelConfig) -> bool:
    return mixtures(config) and config.experts_per_token > 1


def _normalising(config: ModelConfig) -> bool:
    return mixtures(config) and config.router_normalise


def _not_normalising(config: ModelConfig) -> bool:
    return mixtures(config) and not config.router_normalise


def _more_than_ten(config: ModelConfig) -> bool:
    return config.n_experts > 10


def _last_router(config: ModelConfig) -> str:
    return f"blocks.{config.n_layers - 1}.moe.router.kernel"


FAULTS = (
    # which experts
    Fault(
        "lowest-scores",
        "scores sorted upwards and the first ones taken",
        "routing",
        mixtures,
        _routing(lowest_scores),
        _CHOSEN,
    ),
    Fault(
        "one-expert-fewer",
        "another model's number of active experts, or the config's own one not read",
        "routing",
        _of_several,
        _routing(one_expert_fewer),
        _CHOSEN,
    ),
    Fault(
        "bias-in-choice",
        "DeepSeek's correction bias, which takes part in the choice and not in the weights, where there is none",
        "routing",
        mixtures,
        _routing(biased_choice),
        _CHOSEN,
    ),
    Fault(
        "bf16-router",
        "a router in the format of computation of the rest",
        "logits",
        mixtures,
        in_model(bf16_router),
        "blocks.0.moe.scores",
        "vllm#58076, vllm#14027, marin#4234",
    ),
    # how much of each
    Fault(
        "router-not-normalised",
        "norm_topk_prob not read: Mixtral or Qwen 3 with the weights of OLMoE",
        "logits",
        _normalising,
        _routing(of_all_experts),
        _WEIGHTS,
        "torchtitan#1448",
    ),
    Fault(
        "router-normalised",
        "the softmax after the choice, as in Mixtral, for one before it",
        "logits",
        _not_normalising,
        _routing(of_chosen_experts),
        _WEIGHTS,
        "mlxcel#391",
    ),
    Fault(
        "sigmoid-router",
        "DeepSeek's sigmoid for the softmax",
        "logits",
        mixtures,
        _routing(sigmoid_weights),
        _WEIGHTS,
    ),
    Fault(
        "weights-on-inputs",
        "Llama 4's weights on what an expert reads taken for Mixtral's on what it writes, or the other way round",
        "logits",
        mixtures,
        _around_experts(weights_on_inputs),
        _OUTPUT,
        "sglang#7889, llm-compressor#1907",
    ),
    Fault(
        "dropped-tokens",
        "experts of a fixed capacity: what comes too late passes them by",
        "logits",
        mixtures,
        _around_experts(with_capacity),
        _OUTPUT,
    ),
    # which is which
    Fault(
        "experts-by-name",
        "experts sorted by name, where 10 comes before 2",
        "logits",
        _more_than_ten,
        in_model(experts_by_name),
        _OUTPUT,
        "torchtitan#1918",
    ),
    Fault(
        "swapped-w1-and-w3",
        "Mixtral's w3, which is up, taken for its gate",
        "logits",
        mixtures,
        in_model(swapped_w1_and_w3),
        _OUTPUT,
    ),
    # gradients
    Fault(
        "detached-router",
        "weights cut out of the graph together with the choice: all is right forward, and the router learns nothing",
        "gradients",
        mixtures,
        _routing(detached_weights),
        _last_router,
    ),
    Fault(
        "softmax-twice",
        "the balance loss of probabilities taken for scores: everything else is right, and its push is almost gone",
        "balance",
        mixtures,
        replacing("torch_gpt.parallel.routing_of", softmax_of_probabilities),
        "",
        "transformers#45120",
    ),
    Fault(
        "balance-of-a-part",
        "the balance loss of each micro-batch or device by itself, for that of the whole step",
        "balance",
        mixtures,
        replacing("torch_gpt.step.summed_router_loss", load_of_a_part),
        "",
        "torchtitan#4772",
    ),
)
