"""Any two models, not only ours: record what named submodules compute, map the names, find where the two part.

    a = record_nnx(flax_model, image)
    b = record_torch(torch_model, image.transpose(0, 3, 1, 2))
    print(compare(a, b, names={"conv": ("features.0", "batch channel row column -> batch row column channel")}))

A *site* is a submodule by its dotted path ("layers.0.attention"); its value is what the submodule returned. Sites are
kept in the order in which submodules finish, which is the order of the data's path. The model's own output is the
last site, `OUTPUT`. A submodule that runs more than once has the further sites "path#2", "path#3"; one that returns
several arrays has "path[0]", "path[1]" or "path[key]". Values are copied to NumPy at once and keep their dtype.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import einops
import ml_dtypes
import numpy as np

from gpt_core.errors import InputError
from parity.comparison.divergence import Divergence, first_divergence
from parity.comparison.measures import Array, Difference, difference
from parity.comparison.tolerances import tolerance as bound_of
from parity.records.file import StoredRecord, write_record

if TYPE_CHECKING:
    import torch
    from flax import nnx

OUTPUT = "(output)"
"""The site of what the whole model returned; no submodule can have this name."""

Layout = str | Callable[[Array], Array]
"""How a site of b becomes the shape of its partner: an einops pattern, or a function of the array."""

Names = Mapping[str, str | tuple[str, Layout]]
"""Site of a -> its partner in b, with a layout where the two order their axes differently."""


@dataclass(frozen=True)
class Record:
    """What the submodules of a model computed in one call.

    Args:
        sites: Path -> value, along the data's path; the last is `OUTPUT`.
        framework: What it ran in, for messages.
    """

    sites: Mapping[str, Array]
    framework: str

    @property
    def output(self) -> Array:
        """What the model returned.

        Raises:
            InputError: it returned several arrays, which are sites such as "(output)[0]".
        """
        if OUTPUT not in self.sites:
            raise InputError(f"the model returned several arrays: {', '.join(s for s in self.sites if OUTPUT in s)}")
        return self.sites[OUTPUT]

    def save(self, path: Path, *, force: bool = False) -> None:
        """Write the record, to be compared on another machine: an .npz file, or a folder of .npy files.

        Raises:
            InputError: it exists already, or cannot be written.
        """
        dtypes = {site: value.dtype.name for site, value in self.sites.items()}
        metadata = {"kind": "model", "framework": self.framework, "sites": list(self.sites), "dtypes": dtypes}
        write_record(path, metadata, ((f"site:{site}", value) for site, value in self.sites.items()), force=force)


def load_record(path: Path) -> Record:
    """A record that `Record.save` wrote; each site is read when it is looked up.

    Raises:
        InputError: it is missing, damaged, of another version, or a record of a checkpoint.
    """
    stored = StoredRecord(path)
    if stored.metadata.get("kind") != "model":
        raise InputError(
            f"{path}: was not written by Record.save; compare records of checkpoints with `parity compare`"
        )
    members = {site: f"site:{site}" for site in stored.listed("sites")}
    stored.require(members.values())
    dtypes = stored.metadata.get("dtypes")
    if not isinstance(dtypes, dict) or members.keys() - dtypes:
        raise InputError(f"{path}: its metadata does not say the dtypes of its sites; save it again")
    return Record(_Restored(stored.arrays(members), dtypes), str(stored.metadata.get("framework")))


def record_torch(module: "torch.nn.Module", inputs: Any, sites: Sequence[str] | None = None) -> Record:
    """Run a PyTorch module once, without gradients, and keep what its submodules return.

    The module runs in the mode that it is in: call `module.eval()` first where dropout or batch statistics matter.

    Args:
        module: Any module; forward hooks are added for this one call.
        inputs: An array, a tuple of positional arguments or a mapping of keyword arguments. NumPy arrays become
            tensors on the module's device.
        sites: Paths of submodules as in `named_modules`; all that return arrays unless given.

    Raises:
        InputError: a site is no submodule, did not run, or did not return arrays.
    """
    import torch

    device = next((tensor.device for tensor in module.state_dict().values()), torch.device("cpu"))
    recorder = _Recorder("torch", sites, lambda value: _from_torch(value) if torch.is_tensor(value) else None)
    modules = {path: child for path, child in module.named_modules() if path}
    recorder.require_submodules(modules)
    hooks = [
        child.register_forward_hook(lambda _, __, result, path=path: recorder.add(path, result))
        for path, child in modules.items()
        if recorder.wants(path)
    ]
    try:
        with torch.no_grad():
            arguments, keywords = _arguments(inputs, lambda array: torch.tensor(array, device=device))
            recorder.add(OUTPUT, module(*arguments, **keywords))
    finally:
        for hook in hooks:
            hook.remove()
    return recorder.record()


def record_nnx(module: "nnx.Module", inputs: Any, sites: Sequence[str] | None = None) -> Record:
    """Run a Flax NNX module once, outside of jit, and keep what its submodules return.

    `flax.nnx.capture` records outputs too, but by path and not in the order of the calls, and not those of inherited
    methods; so the classes' `__call__` is wrapped here for this one call. A submodule inside `nnx.scan`, `nnx.vmap` or
    `nnx.remat` runs on traced values and cannot be a site; unroll the layers, or make the whole a site.

    The module runs in the mode that it is in: call `module.eval()` first where dropout or batch statistics matter.

    Args:
        module: Any module; only `__call__` of its submodules is recorded.
        inputs: An array, a tuple of positional arguments or a mapping of keyword arguments. NumPy arrays become JAX
            arrays, and keep their values.
        sites: Paths of submodules as in `nnx.iter_modules`, joined by dots; all that return arrays unless given.

    Raises:
        InputError: a site is no submodule, did not run, ran on traced values, or did not return arrays; or an input
            would lose precision, since JAX runs without x64.
    """
    import jax
    from flax import nnx

    def to_array(value: Any) -> Array | None:
        if isinstance(value, jax.core.Tracer):
            raise InputError("a submodule ran inside a transformation such as jit or scan; record it outside of one")
        return np.array(value) if isinstance(value, jax.Array | np.ndarray) else None

    recorder = _Recorder("jax", sites, to_array)
    modules = {".".join(map(str, path)): child for path, child in nnx.iter_modules(module) if path}
    recorder.require_submodules(modules)
    paths = {id(child): path for path, child in modules.items() if recorder.wants(path)}
    with _calls_recorded({type(child) for child in modules.values()}, paths, recorder):
        arguments, keywords = _arguments(inputs, _to_jax)
        recorder.add(OUTPUT, module(*arguments, **keywords))
    return recorder.record()


@dataclass(frozen=True)
class Comparison:
    """How far two records are from each other.

    Args:
        differences: Site of a -> its difference from its partner in b, along a's path.
        partners: Site of a -> site of b.
        tolerance: Largest relative error that counts as equal.
        divergence: The first site beyond it, or None.
    """

    differences: Mapping[str, Difference]
    partners: Mapping[str, str]
    tolerance: float
    divergence: Divergence | None

    @property
    def passed(self) -> bool:
        """Whether all sites agree."""
        return self.divergence is None

    def __str__(self) -> str:
        lines = [
            f"{'equal ' if found.relative_error <= self.tolerance else 'DIFFER'} {found.relative_error:.1e}  "
            f"{site}{'' if self.partners[site] == site else f' = {self.partners[site]}'}"
            for site, found in self.differences.items()
        ]
        verdict = (
            str(self.divergence) if self.divergence else f"all {len(lines)} sites agree within {self.tolerance:.0e}"
        )
        return "\n".join([*lines, verdict])


def compare(
    record_a: Record, record_b: Record, names: Names | None = None, tolerance: float | None = None
) -> Comparison:
    """Compare two records site by site and find the first that differs.

    Args:
        record_a: The model in question. Its order of sites is the path that is walked.
        record_b: The reference.
        names: Site of a -> site of b, or (site of b, layout), where the layout turns the array of b into the axes of
            a: an einops pattern such as "b c h w -> b h w c", or a function. Sites that are not named are left out,
            except `OUTPUT`, which is compared wherever both models return one array. Without names, both must have
            the same sites.
        tolerance: Largest relative error (max|a - b| / max|b|) that counts as equal. Unless given, the project's
            bound for activations in the coarsest dtype that occurs.

    Raises:
        InputError: the map does not fit: a name that is no site, two sites for one, other shapes, a layout that
            fails; or no tolerance is known for a dtype. All that is wrong with the map stands in one message.
    """
    pairs = _pairs(record_a, record_b, names)
    problems = _name_problems(record_a, record_b, pairs)
    if problems or not pairs:
        raise InputError(f"the names do not fit: {'; '.join(problems) or 'they name no site, so nothing is compared'}")
    order = [site for site in record_a.sites if site in pairs]
    partners = _Partners(record_b.sites, pairs)
    problems, dtypes = [], set()
    differences: dict[str, Difference] = {}
    for site in order:
        a = record_a.sites[site]
        try:
            b = partners[site]
        except Exception as error:  # a layout is anybody's code
            shape, reason = list(record_b.sites[pairs[site][0]].shape), " ".join(str(error).split())
            problems.append(f"the layout of {pairs[site][0]!r} fails on {shape}: {reason}")
            continue
        if a.shape != b.shape:
            problems.append(_shape_problem(site, a, pairs[site][0], b))
            continue
        dtypes |= {a.dtype.name, b.dtype.name}
        differences[site] = difference(a, b)
    if problems:
        raise InputError(f"the names do not fit: {'; '.join(problems)}")
    bound = _bound(dtypes) if tolerance is None else tolerance
    differs = any(not found.relative_error <= bound for found in differences.values())
    return Comparison(
        differences,
        {site: pairs[site][0] for site in order},
        bound,
        first_divergence(record_a.sites, partners, order, bound) if differs else None,
    )


@dataclass
class _Recorder:
    """Collects values of sites while a model runs."""

    framework: str
    wanted: Sequence[str] | None
    to_array: Callable[[Any], Array | None]
    sites: dict[str, Array] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def wants(self, path: str) -> bool:
        return self.wanted is None or path in self.wanted

    def require_submodules(self, modules: Mapping[str, Any]) -> None:
        if isinstance(self.wanted, str):
            raise InputError(f"sites = {self.wanted!r} must be a list of paths, not one string")
        for site in self.wanted or ():
            if site not in modules:
                raise InputError(f"{site!r} is no submodule of this {self.framework} model{_like(site, modules)}")

    def add(self, path: str, result: Any) -> None:
        self.calls[path] = self.calls.get(path, 0) + 1
        name = path if self.calls[path] == 1 else f"{path}#{self.calls[path]}"
        found = dict(self._leaves(name, result))
        if not found and path == OUTPUT:
            raise InputError(
                f"the model returned {type(result).__name__}, which holds no arrays; wrap it in one that does"
            )
        if not found and self.wanted is not None:
            raise InputError(f"{path!r} returned {type(result).__name__}, which holds no arrays; choose another site")
        self.sites |= found

    def _leaves(self, name: str, value: Any) -> Iterator[tuple[str, Array]]:
        array = self.to_array(value)
        if array is not None:
            yield name, array
        elif isinstance(value, Mapping):
            for key, item in value.items():
                yield from self._leaves(f"{name}[{key}]", item)
        elif isinstance(value, tuple | list):
            for index, item in enumerate(value):
                yield from self._leaves(f"{name}[{index}]", item)

    def record(self) -> Record:
        idle = [site for site in self.wanted or () if site not in self.calls]
        if idle:
            raise InputError(f"{idle[0]!r} did not run, or not by being called; choose a submodule that is called")
        return Record(self.sites, self.framework)


class _View(Mapping[str, Array]):
    """A mapping of arrays made when they are looked up."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = arrays

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


class _Restored(_View):
    """Stored arrays in the dtype that they had: bf16 lies in files as fp32."""

    def __init__(self, arrays: Mapping[str, Array], dtypes: Mapping[str, str]) -> None:
        super().__init__(arrays)
        self._dtypes = dtypes

    def __getitem__(self, name: str) -> Array:
        array = super().__getitem__(name)
        return array.astype(ml_dtypes.bfloat16) if self._dtypes[name] == "bfloat16" else array


class _Partners(_View):
    """The sites of b by the names and in the layouts of a."""

    def __init__(self, arrays: Mapping[str, Array], pairs: Mapping[str, tuple[str, Layout | None]]) -> None:
        super().__init__(arrays)
        self._pairs = pairs

    def __getitem__(self, name: str) -> Array:
        partner, layout = self._pairs[name]
        array = super().__getitem__(partner)
        if layout is None:
            return array
        return einops.rearrange(array, layout) if isinstance(layout, str) else np.asarray(layout(array))


@contextmanager
def _calls_recorded(classes: set[type], paths: Mapping[int, str], recorder: _Recorder) -> Iterator[None]:
    """Wrap `__call__` of some classes for the length of the block; instances without a path are left alone."""
    running: set[int] = set()  # a `super().__call__()` is part of a call, not another one

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(self: Any, *arguments: Any, **keywords: Any) -> Any:
            if id(self) not in paths or id(self) in running:
                return call(self, *arguments, **keywords)
            running.add(id(self))
            try:
                result = call(self, *arguments, **keywords)
            finally:
                running.discard(id(self))
            recorder.add(paths[id(self)], result)
            return result

        return recorded

    # All are looked up before any is replaced: a class may inherit from another one of the model.
    calls = {found: _call_of(found) for found in classes}
    own: dict[Any, Any] = {found: vars(found).get("__call__") for found, call in calls.items() if call is not None}
    try:
        for found in own:
            found.__call__ = wrapped(calls[found])
        yield
    finally:
        for found, before in own.items():
            if before is None:
                del found.__call__
            else:
                found.__call__ = before


def _call_of(found: type) -> Any:
    """The `__call__` of a class's instances; `found.__call__` would find that of its metaclass too."""
    return next((vars(base)["__call__"] for base in found.__mro__ if "__call__" in vars(base)), None)


def _arguments(inputs: Any, convert: Callable[[Array], Any]) -> tuple[list[Any], dict[str, Any]]:
    def converted(value: Any) -> Any:
        return convert(value) if isinstance(value, np.ndarray) else value

    if isinstance(inputs, Mapping):
        return [], {name: converted(value) for name, value in inputs.items()}
    return [converted(value) for value in (inputs if isinstance(inputs, tuple) else (inputs,))], {}


def _from_torch(tensor: "torch.Tensor") -> Array:
    """A copy: an in-place operation further on must not reach the record."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16)
    return tensor.numpy().copy()


def _to_jax(array: Array) -> Any:
    import jax
    import jax.numpy as jnp

    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    narrowed = array.astype(dtype)
    # Without x64, JAX turns int64 into int32, which is fine for ids, and float64 into float32, which is another input.
    if dtype != array.dtype and (array.dtype.kind == "f" or not np.array_equal(narrowed, array)):
        raise InputError(
            f"an input is {array.dtype}, which JAX would turn into {dtype}; give {dtype}, or enable jax_enable_x64"
        )
    return jnp.array(narrowed)


def _pairs(record_a: Record, record_b: Record, names: Names | None) -> dict[str, tuple[str, Layout | None]]:
    if names is None:
        names = {site: site for site in dict.fromkeys([*record_a.sites, *record_b.sites])}
    pairs: dict[str, tuple[str, Layout | None]] = {
        site: (partner, None) if isinstance(partner, str) else partner for site, partner in names.items()
    }
    if OUTPUT in record_a.sites and OUTPUT in record_b.sites:
        pairs.setdefault(OUTPUT, (OUTPUT, None))
    return pairs


def _name_problems(record_a: Record, record_b: Record, pairs: Mapping[str, tuple[str, Layout | None]]) -> list[str]:
    problems = [
        f"{site!r} is no site of a{_like(site, record_a.sites)}" for site in pairs if site not in record_a.sites
    ]
    chosen: dict[str, str] = {}
    for site, (partner, _) in pairs.items():
        if partner not in record_b.sites:
            problems.append(f"{partner!r} is no site of b{_like(partner, record_b.sites)}")
        elif partner in chosen:
            problems.append(f"{partner!r} of b is the partner of both {chosen[partner]!r} and {site!r}")
        chosen.setdefault(partner, site)
    return problems


def _like(name: str, known: Mapping[str, Any]) -> str:
    """The end of a sentence about a name that is not known."""
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f" (did you mean {near[0]!r}?)"
    return f" (there are: {', '.join(list(known)[:8])}{', ...' if len(known) > 8 else ''})"


def _shape_problem(site: str, a: Array, partner: str, b: Array) -> str:
    text = f"{site!r} has shape {list(a.shape)} and {partner!r} has {list(b.shape)}"
    if a.ndim == b.ndim <= 5:
        axes = "abcde"[: b.ndim]
        fits = [order for order in permutations(range(b.ndim)) if tuple(b.shape[i] for i in order) == a.shape]
        if fits:
            pattern = f"{' '.join(axes)} -> {' '.join(axes[i] for i in fits[0])}"
            return f'{text}; if only the axes are ordered otherwise, give ({partner!r}, "{pattern}")'
    return text


def _bound(dtypes: set[str]) -> float:
    """The project's bound for activations in the coarsest of some dtypes; whole numbers have none of their own."""
    known = [dtype for dtype in ("bfloat16", "float32", "float64") if dtype in dtypes]
    if not known or "float16" in dtypes:
        raise InputError(f"there is no bound for {', '.join(sorted(dtypes))}; give a tolerance")
    return bound_of("activations", known[0])
