"""Opening a checkpoint by path or hub name, and writing one in any format: adapted, whole or not at all, read back.

What `parity convert` does between files, and `from_pretrained` and `save_pretrained` between files and models.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from gpt_core.checkpoints.adapted import open_checkpoint, open_with_adapter
from gpt_core.checkpoints.hashing import WeightsHash, parts
from gpt_core.checkpoints.hub import local_folder
from gpt_core.checkpoints.replaceable import kept_checkpoint
from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.files.reading import real_path
from gpt_core.files.writing import atomic_directory, sync_directory
from gpt_core.formats import format_of, is_hugging_face
from gpt_core.formats.base import Checkpoint
from gpt_core.formats.hf_folder import carry, write_card
from gpt_core.formats.targets import HUGGING_FACE, Target, choose_target
from gpt_core.parameters import Parameter, parameter_table
from gpt_core.storage.adaptation import same_function
from gpt_core.storage.tensor_info import Array, contiguous, pieces
from gpt_core.storage.weights import DType, Source, cast
from gpt_core.text.tokenizer import Tokenizer

_THREADS = 2  # of reading back: one compares while the other waits for its pages


@dataclass(frozen=True)
class Origin:
    """Where weights come from, for the exported folder.

    Args:
        name: Of the model, for its card.
        training: One line on the training run, or "".
        parity: One line of a parity report, or "".
        notices: What reading the source changed.
        folder: The checkpoint whose tokenizer files, token ids and `generation_config.json` are taken along, or None.
    """

    name: str
    training: str = ""
    parity: str = ""
    notices: tuple[str, ...] = ()
    folder: Path | None = None


@dataclass(frozen=True)
class Written:
    """What was written.

    Args:
        target: The format, and how the model is held in it.
        notices: What a person should know, one sentence each.
        weights_sha256: Of the weights that were read back, by value.
        write_seconds: Reading, converting, writing and syncing.
        verify_seconds: Reading back and comparing, bit by bit.
    """

    target: Target
    notices: tuple[str, ...]
    weights_sha256: str
    write_seconds: float
    verify_seconds: float


def open_pretrained(path_or_name: str | Path, adapter: Path | None = None) -> Checkpoint:
    """Open a checkpoint of any format: a folder, a training run (`RUN@best`), or a name on the Hugging Face hub.

    Args:
        path_or_name: Of the checkpoint.
        adapter: Folder of an adapter in PEFT's format, which is merged into it.

    Raises:
        InputError: there is none, the hub cannot be reached, or it is damaged or beyond our models; or the adapter does
            not belong to it.
    """
    folder = local_folder(path_or_name)
    return open_checkpoint(folder) if adapter is None else open_with_adapter(folder, adapter)


def write_pretrained(
    destination: Path,
    config: ModelConfig,
    source: Source,
    dtypes: Mapping[str, DType] | DType,
    origin: Origin,
    to: str = HUGGING_FACE,
    *,
    tokenizer: Tokenizer | None = None,
    allow_remote_code: bool = False,
    force: bool = False,
    advance: Callable[[int], None] = lambda parts: None,
    **options: Any,
) -> Written:
    """Write a model in a format and verify it by reading it back, before it takes its name.

    Args:
        destination: Folder to write.
        config: The model.
        source: Gives its parameters.
        dtypes: Of its parameters; or one dtype, to which all of them are cast.
        origin: Where they come from.
        to: A name of `gpt_core.formats.targets.TARGETS`.
        tokenizer: GPT-2's, or None.
        allow_remote_code: Whether an export may bring its own modelling code where no native architecture fits.
        force: Replace a checkpoint or an export that exists.
        advance: Called after each of `parts(config)` that is read; each is read once to write and once to verify.
        options: Passed to the format's writer.

    Raises:
        InputError: a bad destination, a format that cannot express the model, or what was read back is not what was
            written.
    """
    target = choose_target(to, config, allow_remote_code=allow_remote_code)
    writer, after = format_of(target.format), target.adaptation.after
    if isinstance(dtypes, Mapping):
        kept, stored = source, dtypes
    else:
        kept, stored = cast(source, dtypes), dict.fromkeys(parameter_table(config), dtypes)
    read = target.adaptation.source(_counting(kept, advance), stored)
    if is_hugging_face(target.format):
        options |= {"inherit": origin.folder}
    with atomic_directory(destination, replace=kept_checkpoint if force else None) as folder:
        started = time.perf_counter()
        writer.write(folder, after, read, target.adaptation.dtypes(stored), tokenizer, **options)
        if origin.folder is not None:
            carry(origin.folder, folder)
        sync_directory(folder)
        written = time.perf_counter()
        try:
            sha256, warnings = _verify(
                read, after, writer.open_checkpoint(folder), target.adaptation.source(source, stored)
            )
        except InputError as error:
            raise InputError(f"{destination}: not kept, it reads back wrong; is the disk sound? ({error})") from None
        verified = time.perf_counter()
        notices = (*origin.notices, *target.adaptation.notices, *warnings)
        if is_hugging_face(target.format):
            write_card(
                folder,
                after,
                name=origin.name,
                variant=config.variant,
                training=origin.training,
                parity=origin.parity,
                notices=notices,
                sha256=sha256,
            )
    return Written(target, notices, sha256, written - started, verified - written)


class Saving:
    """Saving to every format, those of Hugging Face included: what the models of both frameworks have from here."""

    config: ModelConfig

    def stored(self) -> tuple[Source, dict[str, DType]]:
        """The parameters as they are stored, and their dtypes."""
        raise NotImplementedError

    def save_pretrained(
        self,
        path: str | Path,
        to: str = HUGGING_FACE,
        *,
        tokenizer: Tokenizer | None = None,
        allow_remote_code: bool = False,
        force: bool = False,
    ) -> Written:
        """Write a checkpoint and read it back; it takes its name when it is complete.

        Args:
            path: Folder to write.
            to: A format as for `parity convert`; "hf" picks the architecture of transformers that fits.
            tokenizer: Written along, so that text can be run on the folder.
            allow_remote_code: Whether "hf" may bring its own modelling code where no native architecture fits.
            force: Replace a folder that exists.

        Raises:
            InputError: the format cannot express the model, or the destination exists, is read-only or full.
        """
        source, dtypes = self.stored()
        return write_pretrained(
            Path(path),
            self.config,
            source,
            dtypes,
            Origin(real_path(path).name),
            to,
            tokenizer=tokenizer,
            allow_remote_code=allow_remote_code,
            force=force,
        )


def _counting(read: Source, advance: Callable[[int], None]) -> Source:
    def counted(parameter: Parameter) -> Array:
        array = read(parameter)
        advance(1)
        return array

    return counted


def _verify(read: Source, config: ModelConfig, copy: Checkpoint, original: Source) -> tuple[str, tuple[str, ...]]:
    """Hold what was written against its source, part by part: the hash of the copy, and warnings.

    Args:
        read: What was written.
        config: The model.
        copy: What can be read of it now.
        original: The same before it was cast, to tell whose an infinity is.
    """
    if not same_function(config, copy.config):
        raise InputError("its config reads back as another model")
    strange: list[str] = []  # hold NaN or infinity
    beyond: list[str] = []  # and were finite before the cast
    digest = WeightsHash(config)

    def compared(part: Parameter) -> Array:
        wanted, found = read(part), copy.read(part)
        if wanted.dtype != found.dtype or not _same_bits(wanted, found):
            raise InputError(f"{part.name} differs from what was written")
        return found

    # Two parts at a time: neither side stacks, and no more than these are in memory.
    with ThreadPoolExecutor(_THREADS) as pool:
        left = parts(config)
        running = [(part, pool.submit(compared, part)) for part in islice(left, _THREADS)]
        while running:
            part, future = running.pop(0)
            found = future.result()
            del future
            following = next(left, None)
            if following is not None:
                running.append((following, pool.submit(compared, following)))
            digest.add(part, found)
            if not _finite(found):
                kind, dtype = beyond if _finite(original(part)) else strange, found.dtype
                kind.append(part.name if part.layer is None else f"{part.name}, layer {part.layer}")
            del found
    warnings = []
    if strange:
        warnings.append(f"{len(strange)} tensors hold NaN or infinity, such as {strange[0]}")
    if beyond:
        warnings.append(f"{len(beyond)} tensors hold values that become infinite in {dtype}, such as {beyond[0]}")
    return digest.hexdigest(), tuple(warnings)


def _finite(array: Array) -> bool:
    return all(np.isfinite(piece).all() for piece in pieces(contiguous(array)))


def _same_bits(a: Array, b: Array) -> bool:
    """Whether two arrays are of the same bytes: NaN is a value like another here, and -0 is not 0."""
    bits = f"u{a.dtype.itemsize}"
    both = zip(pieces(contiguous(a)), pieces(contiguous(b)), strict=True)
    return all(np.array_equal(one.view(bits), other.view(bits)) for one, other in both)
