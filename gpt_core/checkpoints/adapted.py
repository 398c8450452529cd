"""Checkpoints with an adapter: a base with the adapter merged into it, opened as one.

A run that trains an adapter holds that alone, and says in its `config.yaml` what base it belongs to; this puts both
together. Every command opens checkpoints here.
"""

from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from gpt_core import formats
from gpt_core.adapter import AdapterConfig, adapter_table, fresh_adapter, layer_name, pair_of, target_kernels
from gpt_core.checkpoints.hashing import hash_weights
from gpt_core.checkpoints.hub import local_folder
from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.files.reading import exists
from gpt_core.formats import orbax_jax, safetensors_torch
from gpt_core.formats.base import Checkpoint
from gpt_core.formats.peft import PeftAdapter, open_peft, source_of_peft
from gpt_core.parameters import Parameter, parameter_table
from gpt_core.runs.config import RunConfig
from gpt_core.runs.folder import BASE, Framework, Origin, origin_of, read_run, run_of, write_run
from gpt_core.runs.saved import RUN_FILE, saved_steps
from gpt_core.storage.checkpoint_config import read_checkpoint_config
from gpt_core.storage.merging import Pair, Pairs, merged
from gpt_core.storage.tensor_info import Array, TensorInfo
from gpt_core.storage.weights import DType, Source, cast
from gpt_core.text.finding import tokenizer_of
from gpt_core.text.tokenizer import Tokenizer


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint of any known format; that of a run with an adapter is its base with the adapter merged.

    Raises:
        InputError: nothing is there, no format recognises it, it is damaged; or its base is gone or another one.
    """
    run = run_of(path)
    if run is None or not has_adapter(path):
        return formats.open_checkpoint(path)
    config, _ = read_run(run)
    own = open_run_adapter(path, config)
    base = open_base(run, config)
    read = base.read if config.adapter.base_dtype is None else cast(base.read, _DTYPES[config.adapter.base_dtype])
    pairs = pairs_of(own.read, config.model, config.adapter)
    return AdaptedCheckpoint(path, config.model, base, read, pairs, _widest(own.dtypes), own.tensors)


def config_of(path: Path) -> ModelConfig:
    """The model of a checkpoint; of a run with an adapter without its base.

    Raises:
        InputError: as `open_checkpoint`.
    """
    return read_checkpoint_config(path) if has_adapter(path) else formats.open_checkpoint(path).config


def has_adapter(path: Path) -> bool:
    """Whether a checkpoint is that of a run with an adapter.

    Raises:
        InputError: the run's config is damaged.
    """
    run = run_of(path)
    return run is not None and read_run(run)[0].adapter.rank is not None


def open_with_adapter(path: Path, adapter: Path) -> Checkpoint:
    """Open a checkpoint with an adapter of PEFT's format merged into it.

    Args:
        path: The base.
        adapter: Folder of the adapter.

    Raises:
        InputError: one of them is missing or damaged, or they do not belong together.
    """
    base = open_checkpoint(path)
    own = open_peft(adapter, base.config, base.format)
    require_base(own, base)
    return AdaptedCheckpoint(path, base.config, base, base.read, own.pairs, own.dtype, own.tensors)


def require_base(adapter: PeftAdapter, base: Checkpoint) -> None:
    """Refuse a base that is another than an adapter's folder says; one that says no hash is taken at its word.

    Raises:
        InputError: the hash of the weights differs.
    """
    if adapter.base_sha256 is not None and (found := hash_weights(base)) != adapter.base_sha256:
        raise InputError(
            f"{adapter.path}: belongs to another base: {adapter.base_name or 'one'} of weights "
            f"{adapter.base_sha256[:12]}, and {base.path} has {found[:12]}"
        )


class AdaptedCheckpoint:
    """A base with an adapter merged into it; what it gives is never narrower than either.

    Args:
        path: The checkpoint.
        config: The model.
        base: What the adapter stands beside.
        read: Gives the base's parameters.
        pairs: Gives the adapter.
        dtype: Of the adapter.
        tensors: Of the adapter.
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        base: Checkpoint,
        read: Source,
        pairs: Pairs,
        dtype: DType,
        tensors: Mapping[str, TensorInfo],
    ) -> None:
        self.path, self.config, self.format, self._base = path, config, base.format, base
        self.tensors: Mapping[str, TensorInfo] = {**base.tensors, **tensors}
        self._dtype = np.promote_types(_widest(base.dtypes), dtype)
        self._source = merged(read, pairs, self._dtype)

    @property
    def dtypes(self) -> Mapping[str, DType]:
        """One for all parameters."""
        return dict.fromkeys(parameter_table(self.config), self._dtype)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """GPT-2's tokenizer, where it lies beside the weights."""
        return tokenizer_of(self.path)

    @property
    def notices(self) -> tuple[str, ...]:
        """What a person should know of reading it."""
        told = "the adapter is merged into the base: loading both apart sums in another order, within rounding"
        return tuple(dict.fromkeys((*self._base.notices, told)))

    def read(self, parameter: Parameter) -> Array:
        """A parameter, or one block of it, in canonical axes."""
        return self._source(parameter)


def open_run_adapter(
    checkpoint: Path, config: RunConfig
) -> orbax_jax.JaxCheckpoint | safetensors_torch.TorchCheckpoint:
    """The adapter in a checkpoint of a run, by the names of `adapter_table`.

    Raises:
        InputError: it is missing or damaged, or does not fit the run's config.
    """
    table = adapter_table(config.model, config.adapter)
    return (orbax_jax if orbax_jax.matches(checkpoint) else safetensors_torch).open_checkpoint(checkpoint, table)


def pairs_of(read: Source, model: ModelConfig, adapter: AdapterConfig) -> Pairs:
    """An adapter by the kernels beside which it stands.

    Args:
        read: Gives the parameters of `adapter_table`.
        model: The model.
        adapter: Rank, scale and targets.
    """
    kernels = target_kernels(model, adapter)

    def pairs(parameter: Parameter) -> Pair | None:
        layer = layer_name(parameter.name)
        if parameter.layer is None or layer not in kernels:
            return None
        a, b = (read(row.of_layer(parameter.layer)) for row in pair_of(layer, kernels[layer], adapter.given_rank))
        return Pair(a, b, adapter.scale)

    return pairs


def open_base(run: Path, config: RunConfig) -> Checkpoint:
    """The base of a run with an adapter.

    Raises:
        InputError: it is gone, or not what it was when the run began.
    """
    start = origin_of(run)
    if start is None:
        raise InputError(f"{run / RUN_FILE}: does not say what base the adapter belongs to (start)")
    own = run / BASE
    try:
        folder, why = own if start.name == BASE and exists(own) else local_folder(start.name), ""
    except InputError as error:
        folder, why = Path(start.name), f" ({error})"
    if why or not exists(folder):
        raise InputError(
            f"{run}: its adapter belongs to the base {start.name}, which is gone{why}; put it back there, or change "
            f"from: in {run / RUN_FILE}"
        )
    base = open_checkpoint(folder)
    found = {name: row.shape for name, row in parameter_table(base.config).items()}
    if found != {name: row.shape for name, row in parameter_table(config.model).items()} or (
        hash_weights(base) != start.weights_sha256
    ):
        raise InputError(
            f"{run}: its adapter belongs to the base {start.name} of weights {start.weights_sha256[:12]}, and other "
            f"weights lie there now"
        )
    return base


def keep_base(run: Path, config: RunConfig, framework: Framework, write_fresh: Callable[[Path], None]) -> None:
    """Have a run with an adapter know its base: fresh weights, which it keeps, where it has no other.

    Args:
        run: Its folder, which is held.
        config: The run.
        framework: Which trainer.
        write_fresh: Writes a checkpoint of the first weights.

    Raises:
        InputError: it cannot be written.
    """
    if config.adapter.rank is None or origin_of(run) is not None:
        return
    write_fresh(run / BASE)
    sha256 = hash_weights(formats.open_checkpoint(run / BASE))
    write_run(run, config, framework, None, Origin(BASE, sha256, run))


class Base(NamedTuple):
    """What a run with an adapter begins with.

    Args:
        weights: Gives the parameters of the model, which are frozen.
        adapter: Gives those of the adapter, fresh or out of a file; None for a run that goes on.
    """

    weights: Source
    adapter: Source | None


def base_of(run: Path, config: RunConfig) -> Base | None:
    """The base of a run whose folder knows it; None for a run without an adapter.

    Raises:
        InputError: as `open_base`; or `adapter.start_from` is missing or damaged, of another base, or not what the run
            trains.
    """
    if config.adapter.rank is None:
        return None
    base = open_base(run, config)
    if saved_steps(run):
        return Base(base.read, None)
    if config.adapter.start_from is None:
        return Base(base.read, fresh_adapter(config.model, config.adapter, config.train.seed))
    opened = open_peft(Path(config.adapter.start_from), config.model, base.format)
    require_base(opened, base)
    return Base(base.read, source_of_peft(opened, config.model, config.adapter))


_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def _widest(dtypes: Mapping[str, DType]) -> DType:
    return reduce(np.promote_types, set(dtypes.values()))
