"""The plan of a run: whether it fits, what it costs, what limits it, and what to change."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any

from jax.errors import JaxRuntimeError
from jax.sharding import Mesh

from gpt_core.errors import InputError
from gpt_core.flops import peak_flops, training_flops_per_token
from gpt_core.parameters import active_count, parameter_count
from gpt_core.runs.config import Remat, RunConfig, chunk_of_loss
from gpt_core.runs.training import check_dtype
from jax_gpt.plan import theory
from jax_gpt.plan.compiled import Buffer, Compiled, compile_step
from jax_gpt.plan.prediction import Traffic, step_seconds, traffic
from jax_gpt.plan.topology import Topology, installed
from jax_gpt.sharding import check_divides, create_mesh

SEARCH_SECONDS = 300
_SLOWEST_COMPILATION = 60  # none is begun when less than this is left
_REMATS: tuple[Remat, ...] = ("none", "dots", "full")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it is started; sizes are of one device, times and FLOPs of one step.

    Args:
        config: The run.
        topology: Where it would run.
        mesh: Devices along each axis.
        compiled: What the compiler said.
        memory: Bytes of parameters, moments, gradients, activations kept for the backward pass, and all the rest.
        model_flops: That the model needs (6 N D and attention), a device's part.
        matmul_flops: Of the compiled matrix products, recomputed ones included.
        kernel_flops: Of attention kernels.
        grouped_flops: Of the products of a mixture's experts, if all experts are chosen alike.
        loops_counted_once: Names of loops whose trips the program does not tell.
        theory_flops: What the matrix products should come to.
        grouped_theory_flops: And those of experts.
        sent: Communication.
        minimum_bytes: What this layout must send, by mesh axis.
        seconds: Shortest and longest step that is predicted.
        mfu: Share of the chips' peak that the model gets, lowest and highest.
    """

    config: RunConfig
    topology: Topology
    mesh: Mapping[str, int]
    compiled: Compiled
    memory: Mapping[str, int]
    model_flops: float = 0.0
    matmul_flops: float = 0.0
    kernel_flops: float = 0.0
    grouped_flops: float = 0.0
    loops_counted_once: frozenset[str] = frozenset()
    theory_flops: float = 0.0
    grouped_theory_flops: float = 0.0
    sent: Traffic | None = None
    minimum_bytes: Mapping[str, float] | None = None
    seconds: tuple[float, float] | None = None
    mfu: tuple[float, float] | None = None

    @property
    def hardware_flops(self) -> float:
        """All that is computed."""
        return self.matmul_flops + self.grouped_flops + self.kernel_flops

    @property
    def tokens_per_day(self) -> tuple[float, float] | None:
        """Of the whole slice, fewest and most."""
        if self.seconds is None:
            return None
        fast, slow = self.seconds
        return self.config.tokens_per_step * 86400 / slow, self.config.tokens_per_step * 86400 / fast

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        hbm = self.topology.chip.hbm_bytes
        return {
            "fits": self.compiled.fits,
            "topology": self.topology.name,
            "chips": _product(self.mesh),
            "mesh": dict(self.mesh),
            "attention": theory.attention_of(self.config),
            "parameters": parameter_count(self.config.model),
            "active_parameters": active_count(self.config.model),
            "tokens_per_step": self.config.tokens_per_step,
            "peak_bytes": self.compiled.needed_bytes,
            "hbm_bytes": hbm,
            "headroom_bytes": hbm - self.compiled.needed_bytes,
            "memory": dict(self.memory),
            "largest_buffers": [asdict(buffer) for buffer in self.compiled.buffers],
            "flops": None
            if self.sent is None
            else {
                "model": self.model_flops,
                "hardware": self.hardware_flops,
                "matmul": self.matmul_flops,
                "kernels": self.kernel_flops,
                "grouped": self.grouped_flops,
                "theory": self.theory_flops,
                "grouped_theory": self.grouped_theory_flops,
                "loops_counted_once": sorted(self.loops_counted_once),
            },
            "wire_bytes": None
            if self.sent is None or self.minimum_bytes is None
            else {
                "total": sum(self.sent.by_axis.values()),
                "by_kind": dict(self.sent.by_kind),
                "by_axis": dict(self.sent.by_axis),
                "minimum": sum(self.minimum_bytes.values()),
                "minimum_by_axis": dict(self.minimum_bytes),
            },
            "predicted_step_seconds": self.seconds and list(self.seconds),
            "mfu": self.mfu and list(self.mfu),
            "tokens_per_day": self.tokens_per_day and list(self.tokens_per_day),
            "compile_seconds": self.compiled.seconds,
            "config": self.config.to_dict(),
            "environment": {package: metadata.version(package) for package in ("jax", "libtpu")},
        }


def make_plan(config: RunConfig, topology: Topology, devices: Sequence[Any]) -> Plan:
    """Compile a run's step for a slice and read what came out.

    Args:
        config: The run.
        topology: The slice.
        devices: Of `topology.devices()`.

    Raises:
        InputError: the mesh does not fit the slice or the model, the run is in float64 or has an adapter, or what is
            installed cannot compile the step.
    """
    check_dtype(config, "jax")
    if config.train.dtype == "float64":
        raise InputError("train.dtype = 'float64': TPUs have no fp64; plan with bfloat16 or float32")
    if config.adapter.rank is not None:
        raise InputError("adapter.rank: plans count runs that train all weights, which need more; leave `adapter` out")
    mesh = create_mesh(config.jax.mesh, devices)
    check_divides(config, mesh)
    try:
        compiled = compile_step(config, mesh)
    except JaxRuntimeError as error:
        raise InputError(
            f"--topology {topology.name}: {installed()} cannot compile this step: {str(error).splitlines()[0]}"
        ) from None
    shared = theory.parameter_bytes(config, mesh)
    kept = theory.kept_bytes(config, mesh)
    memory = {"parameters": shared, "moments": 2 * shared, "gradients": shared, "activations": kept}
    memory["temporaries"] = max(0, compiled.needed_bytes - sum(memory.values()))
    plan = Plan(config, topology, dict(mesh.shape), compiled, memory)
    return plan if compiled.program is None else _with_costs(plan, mesh)


def _with_costs(plan: Plan, mesh: Mesh) -> Plan:
    program, config = plan.compiled.program, plan.config
    assert program is not None  # it fits
    sent = traffic(program.collectives(), mesh, plan.topology)
    kernels = theory.kernel_flops(program.kernels(), config)
    grouped = program.ragged_flops() * (theory.grouped_share(config, mesh) if config.model.n_experts else 1)
    fast, slow = step_seconds(program.cycles(), kernels + grouped, sent, plan.topology)
    needed = training_flops_per_token(config.model, config.context_length) * config.tokens_per_step / mesh.size
    peak = peak_flops(plan.topology.chip.kind, "bfloat16") or 0.0
    return replace(
        plan,
        model_flops=needed,
        matmul_flops=program.matmul_flops(),
        kernel_flops=kernels,
        grouped_flops=grouped,
        loops_counted_once=frozenset(program.unknown_loops),
        theory_flops=theory.matmul_flops(config, mesh),
        grouped_theory_flops=theory.grouped_flops(config, mesh),
        sent=sent,
        minimum_bytes=theory.minimum_wire_bytes(config, mesh, plan.topology.slices),
        seconds=(fast, slow),
        mfu=(needed / slow / peak, needed / fast / peak),
    )


def search(
    config: RunConfig, topology: Topology, devices: Sequence[Any], say: Say
) -> tuple[dict[str, Any], Plan] | None:
    """The change that costs least among those with which a run fits: the first in order of cost that compiles.

    Batch, model and precision stay as they are: rows of a device at a time, what is recomputed, the loss's chunk and
    the mesh change.

    Args:
        config: The run, which does not fit.
        topology: The slice.
        devices: Of the slice.
        say: Is told what is tried.

    Returns:
        The flags to change with their values, and the plan; None when nothing was found within `SEARCH_SECONDS`.
    """
    start = time.monotonic()
    for flags, candidate in _candidates(config, topology, devices):
        if time.monotonic() - start > SEARCH_SECONDS - _SLOWEST_COMPILATION:
            return None
        say("trying " + written(flags))
        try:
            plan = make_plan(candidate, topology, devices)
        except InputError as error:  # the compiler has its limits: small models shared out along fsdp x tensor, say
            say(f"left out: {error}")
            continue
        if plan.compiled.fits:
            return flags, plan
    return None


def written(flags: Mapping[str, Any]) -> str:
    """Flags as on a command line."""
    return " ".join(f"--{name} {value}" for name, value in flags.items())


def _candidates(
    config: RunConfig, topology: Topology, devices: Sequence[Any]
) -> Iterator[tuple[dict[str, Any], RunConfig]]:
    """Changes of a run in order of what they cost, without those that cannot fit."""
    peak = peak_flops(topology.chip.kind, "bfloat16") or 1.0
    found: list[tuple[float, int, dict[str, Any], RunConfig]] = []
    start = create_mesh(config.jax.mesh, devices)
    for flags, candidate in _changes(config, start, topology.slices):
        try:
            mesh = create_mesh(candidate.jax.mesh, devices)
            check_divides(candidate, mesh)
        except InputError:
            continue
        if theory.least_bytes(candidate, mesh) > topology.chip.hbm_bytes:
            continue
        # Roughly: products at the utilisation that is usual, half of the communication hidden.
        sent = sum(theory.minimum_wire_bytes(candidate, mesh, topology.slices).values())
        products = theory.matmul_flops(candidate, mesh) + theory.grouped_flops(candidate, mesh)
        cost = products / (0.6 * peak) + 0.5 * sent / topology.chip.ring_bandwidth
        found.append((cost, len(found), flags, candidate))
    for _, _, flags, candidate in sorted(found, key=lambda one: one[:2]):
        yield flags, candidate


def _changes(config: RunConfig, mesh: Mesh, slices: int) -> Iterator[tuple[dict[str, Any], RunConfig]]:
    data, fsdp, tensor = (mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    meshes = [(data, fsdp, tensor)]
    of_slice = data * fsdp * tensor // slices
    meshes += [(slices, of_slice // size, size) for size in (tensor, 1, 2, 4, 8) if of_slice % size == 0]
    rows = config.train.batch_size // config.train.accumulation
    for sizes in dict.fromkeys(meshes):
        for remat in _REMATS[_REMATS.index(config.jax.remat) :]:
            for chunk in dict.fromkeys((config.jax.loss_chunk, min(chunk_of_loss(config.jax.loss_chunk), 256))):
                accumulation = config.train.accumulation
                while (
                    accumulation <= config.train.batch_size and rows % (accumulation // config.train.accumulation) == 0
                ):
                    flags: dict[str, Any] = {}
                    if sizes != (data, fsdp, tensor):
                        flags |= dict(zip(("jax.mesh.data", "jax.mesh.fsdp", "jax.mesh.tensor"), sizes, strict=True))
                    if remat != config.jax.remat:
                        flags["jax.remat"] = remat
                    if chunk != config.jax.loss_chunk:
                        flags["jax.loss_chunk"] = chunk
                    if accumulation != config.train.accumulation:
                        flags["train.accumulation"] = accumulation
                    if flags:
                        new_mesh = replace(
                            config.jax.mesh,
                            data=sizes[0],
                            fsdp=sizes[1],
                            expert=mesh.shape["expert"],
                            tensor=sizes[2],
                            fsdp_inner=None,
                        )
                        yield (
                            flags,
                            replace(
                                config,
                                train=replace(config.train, accumulation=accumulation),
                                jax=replace(config.jax, mesh=new_mesh, remat=remat, loss_chunk=chunk),
                            ),
                        )
                    accumulation *= 2


def described(plan: Plan) -> str:
    """The plan on one screen."""
    config, compiled, topology = plan.config, plan.compiled, plan.topology
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    hbm = topology.chip.hbm_bytes
    copies = _product(plan.mesh) // plan.mesh["tensor"]
    active = f" ({active_count(config.model) / 1e9:.2f}B active)" if config.model.n_experts else ""
    lines = [
        f"{topology.name}, {_product(plan.mesh)} chips as {mesh}: "
        f"{parameter_count(config.model) / 1e9:.2f}B parameters{active}, "
        f"{config.train.batch_size} x {config.context_length} = {config.tokens_per_step:,} tokens a step, "
        f"{config.train.batch_size // config.train.accumulation // copies} row(s) of a device at a time, "
        f"attention {theory.attention_of(config)}"
    ]
    free = hbm - compiled.needed_bytes
    verdict = f"yes, {_gib(free)} ({free / hbm:.0%}) left" if compiled.fits else "NO"
    lines.append(f"fits      {verdict}: a device needs {_gib(compiled.needed_bytes)} of {_gib(hbm)}")
    lines.append("memory    " + ", ".join(f"{name} {_gib(size)}" for name, size in plan.memory.items()))
    shown = compiled.buffers[: 3 if compiled.fits else 6]
    lines += [f"{'largest' if i == 0 else '':9} {_gib(b.bytes)} {b.shape} {_readable(b)}" for i, b in enumerate(shown)]
    if plan.sent is None or plan.minimum_bytes is None or plan.seconds is None or plan.mfu is None:
        return "\n".join(lines)
    hardware, of_experts, against = plan.hardware_flops, "", ""
    if plan.grouped_theory_flops:
        of_experts = f"experts {plan.grouped_flops / 1e12:.1f}, "
        against = f", those of experts {plan.grouped_flops / plan.grouped_theory_flops:.4f}"
    lines.append(
        f"FLOPs     model {plan.model_flops / 1e12:.1f} T, hardware {hardware / 1e12:.1f} T (products "
        f"{plan.matmul_flops / 1e12:.1f}, {of_experts}kernels {plan.kernel_flops / 1e12:.1f}): "
        f"{plan.model_flops / hardware:.0%} of it is the model's; products against theory "
        f"{plan.matmul_flops / plan.theory_flops:.4f}{against}"
    )
    if plan.loops_counted_once:
        lines.append(
            f"          too low: {len(plan.loops_counted_once)} loop(s) of a length that is not told count once here"
        )
    total, least = sum(plan.sent.by_axis.values()), sum(plan.minimum_bytes.values())
    lines.append(
        f"sends     {_gb(total)} ({_each(plan.sent.by_kind)}); this layout's least is {_gb(least)}"
        + (f", so {total / least:.2f}x" if least else "")
    )
    lines.append(f"along     {_along(plan.sent.by_axis, plan.minimum_bytes)}")
    (fast, slow), (low, high) = plan.seconds, plan.mfu
    fewest, most = plan.tokens_per_day or (0.0, 0.0)
    lines.append(
        f"step      {fast:.2f} to {slow:.2f} s: MFU {low:.0%} to {high:.0%}, {fewest / 1e9:,.1f} to {most / 1e9:,.1f} "
        f"billion tokens a day"
    )
    lines.append(f"limit     {_limit(plan.sent, fast)}")
    lines.append(
        "          a prediction from the compiler's estimates; reading data, evaluation, checkpoints and restarts are "
        "left out"
    )
    return "\n".join(lines)


def _limit(sent: Traffic, fast: float) -> str:
    if sent.seconds >= fast:
        return f"communication: {sent.seconds:.2f} s of it, more than there is to compute; more rows a device hide it"
    return (
        f"computation; of {sent.seconds:.2f} s of communication {sent.exposed_seconds:.2f} s are not hidden behind it "
        f"in the program"
    )


def _readable(buffer: Buffer) -> str:
    """Where a buffer comes from, out of the path of its operation."""
    place = buffer.place
    where = "backward" if "transpose(" in place else "forward" if "jvp(" in place else ""
    again = ", recomputed" if "rematted_computation" in place else ""
    last = place.rpartition("/")[2]
    what = {"broadcast_in_dim": "what a scan keeps", "dynamic_update_slice": "what a scan keeps"}.get(last, last)
    return f"({where}{again}: {what})" if where else f"({what})" if what else "(state)"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _each(sizes: Mapping[str, float]) -> str:
    largest = sorted(sizes.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {size / 1e9:.2f}" for name, size in largest if size >= 5e6) or "nothing"


def _along(sent: Mapping[str, float], least: Mapping[str, float]) -> str:
    """What goes along each axis of the mesh beside what must."""
    network = {"dcn": "data between slices (DCN)"}
    parts = [
        f"{network.get(axis, f'{axis} (ICI)')} {_gb(size)}" + (f", least {_gb(least[axis])}" if axis in least else "")
        for axis, size in sorted(sent.items(), key=lambda item: -item[1])
        if size >= 5e6 or axis == "dcn"
    ]
    return "; ".join(parts) or "nothing"


def _product(mesh: Mapping[str, int]) -> int:
    result = 1
    for size in mesh.values():
        result *= size
    return result
