"""How the processes of a run share the work; what `jax_gpt/sharding.py` is to the JAX twin.

DDP (Li et al., 2020): every process has the whole model. FSDP2 (Zhao et al., 2023): they share parameters, gradients
and moments, and put one block at a time together. Rows of the batch are dealt out in either case.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from gpt_core.config import ModelConfig
from gpt_core.data.batches import Batch
from gpt_core.data.order import host_rows
from gpt_core.errors import InputError
from gpt_core.formats.safetensors_torch import spoke_of
from gpt_core.parameters import Parameter
from gpt_core.routing import Routing
from gpt_core.runs.config import RunConfig, TorchConfig
from gpt_core.storage.weights import Source, slots
from torch_gpt.arrays import from_numpy
from torch_gpt.distributed import process_count, process_index
from torch_gpt.loss import chunked_loss, summed_loss
from torch_gpt.model import GPT
from torch_gpt.routing import routing_of, routing_taps


class Objective(nn.Module):
    """Summed loss of some rows, times a weight, and in training what the routers of a mixture did: one module around
    the model, so that DDP and FSDP see a single forward pass.
    """

    def __init__(self, model: GPT, chunk: int) -> None:
        super().__init__()
        self.model = model
        self.chunk = chunk

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor,
        mask: torch.Tensor,
        weight: torch.Tensor | float = 1.0,
        segments: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Routing | None]:
        tied = self.model.config.tied_embeddings
        head = [self.model.token_embedding] if tied else list(self.model.head.parameters())
        taps = routing_taps(self.model.config) if self.model.training else None
        hidden = self.model.hidden(tokens, taps, segments)
        loss = chunked_loss(self.loss_of, head, hidden, targets, mask, self.chunk, weight)
        return loss, routing_of(taps, mask, self.model.config)

    def routing(self, tokens: torch.Tensor, mask: torch.Tensor, segments: torch.Tensor | None = None) -> Routing:
        """What the routers of a mixture do with some rows, without the loss."""
        taps = routing_taps(self.model.config)
        self.model.hidden(tokens, taps, segments)
        routing = routing_of(taps, mask, self.model.config)
        assert routing is not None  # nobody asks a dense model
        return routing

    def loss_of(
        self, hidden: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, *head: torch.Tensor
    ) -> torch.Tensor:
        """Summed loss of the logits of hidden states."""
        return summed_loss(self.model.unembed(hidden, *head), targets, mask)


def check_divides(config: RunConfig) -> None:
    """Refuse a batch that the processes cannot share out evenly.

    Raises:
        InputError: they cannot; the field is named.
    """
    rows = config.train.batch_size // config.train.accumulation
    if rows % process_count():
        raise InputError(
            f"{process_count()} processes do not divide the {rows} rows of a micro-batch "
            f"(train.batch_size / train.accumulation)"
        )


def shared_out(objective: Objective, config: TorchConfig, accelerator: Accelerator) -> nn.Module:
    """The objective as the processes of a run share it: compiled if wanted, copied by DDP or cut up by FSDP2."""
    if config.compile:
        for block in objective.model.blocks:
            # Block by block: one compilation serves them all, and the hooks of FSDP stay outside.
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
        objective.loss_of = torch.compile(objective.loss_of, dynamic=False)  # type: ignore[method-assign]
    if process_count() == 1:
        return objective
    if config.strategy == "ddp":
        prepared: nn.Module = accelerator.prepare_model(objective)
        return prepared
    mesh = init_device_mesh(accelerator.device.type, (process_count(),))
    for block in objective.model.blocks:
        # Experts come together when their turn comes; not within a compiled block, in which no hook can stand.
        if objective.model.config.n_experts and not config.compile:
            fully_shard(block.get_submodule("moe"), mesh=mesh)
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    register_fsdp_forward_method(objective, "routing")
    return objective


def inner(objective: nn.Module) -> Objective:
    """The objective inside of what DDP made of it."""
    module = objective.module if isinstance(objective, DistributedDataParallel) else objective
    assert isinstance(module, Objective)
    return module


def summed(value: torch.Tensor) -> torch.Tensor:
    """Over all processes."""
    if process_count() > 1:
        value = value.clone()
        distributed.all_reduce(value)
    return value


def synchronised(objective: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Gradients of micro-batches are added up where they are, and shared with other processes after the last."""
    if isinstance(objective, FSDPModule):
        objective.set_requires_gradient_sync(last)
    elif isinstance(objective, DistributedDataParallel) and not last:
        return objective.no_sync()
    return nullcontext()


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a parameter, or of one of its moments, on the CPU. All processes must ask for it together."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor.cpu()
    # FSDP2 cuts rows, as many for each process as it takes; the last ones may have fewer, or none.
    mine, rows = tensor.to_local(), -(-len(tensor) // process_count())
    padded = mine.new_zeros(rows, *mine.shape[1:])
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in range(process_count())]
    distributed.all_gather(parts, padded)
    return torch.cat([part.cpu() for part in parts])[: len(tensor)]


def like(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Cut a whole tensor as a parameter is cut, on its device and in its dtype."""
    whole = whole.to(parameter.device, parameter.dtype)
    if not isinstance(parameter, DTensor):
        return whole
    # Every process has the whole: nothing is sent.
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def fill(
    parameters: Mapping[str, nn.Parameter], source: Source, model: ModelConfig, table: Mapping[str, Parameter]
) -> None:
    """Give parameters the values of a source, each process its own part of them, one whole tensor in memory at a time.

    Args:
        parameters: By name; all that the table says, in their own dtypes.
        source: Gives the values.
        model: The model.
        table: What is filled.
    """
    for key, slot in slots(model, spoke_of(table), table).items():
        whole = from_numpy(slot.encode(source(slot.parameter)))
        parameters[key].copy_(like(whole, parameters[key]))


def local_rows(batch_size: int) -> list[int]:
    """Rows of a batch that this process reads, in order."""
    return list(host_rows(batch_size, process_index(), process_count()))


def place_batch(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """The rows of this process on its device."""
    placed = {name: torch.from_numpy(array) for name, array in batch.items()}
    return {name: array.to(device, non_blocking=True) for name, array in placed.items()}
