"""Slices of TPUs that programs can be compiled for without one at hand."""

import importlib.util
import os
import re
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from gpt_core.errors import InputError
from gpt_core.sections import require_flag_count

GIB = 2**30
_MOST_SLICES = 1024


@dataclass(frozen=True)
class Chip:
    """What one chip can do.

    Args:
        name: As people say it.
        kind: As JAX says it; `gpt_core.flops` knows its peak by it.
        prefix: Of the compiler's names of its slices.
        hbm_bytes: Memory that a program can use, as the compiler says it.
        clock: Cycles a second, of the compiler's estimates.
        ring_bandwidth: Bytes a second that a chip sends along one axis of the torus, both directions together.
        dcn_bandwidth: The same between slices, a chip's share of its host's network.
        dimensions: Axes of the torus.
        slices: Shapes that are on offer.
        wraps_at: Sizes of an axis whose ends are joined.
    """

    name: str
    kind: str
    prefix: str
    hbm_bytes: int
    clock: float
    ring_bandwidth: float
    dcn_bandwidth: float
    dimensions: int
    slices: tuple[str, ...]
    wraps_at: int


# Slices: https://cloud.google.com/tpu/docs/v5e, /v5p, /v6e. Bandwidths: "How to Scale Your Model" (Austin et al.,
# 2025), chapter 2. Memory: as the compiler says. Clocks: held against published step times
# (docs/pods.md); v6e has none, and its clock is taken to be that of v5p.
_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "TPU v5 lite", "v5e", int(15.75 * GIB), 1.5e9, 9e10, 3.1e9, 2, _FLAT, 16),
        Chip(
            *("v5p", "TPU v5", "v5", int(95.73 * GIB), 1.75e9, 1.8e11, 6.25e9, 3),
            ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16"),
            4,
        ),
        Chip("v6e", "TPU v6 lite", "v6e", int(31.24 * GIB), 1.75e9, 1.8e11, 12.5e9, 2, _FLAT, 16),
    )
}


@dataclass(frozen=True)
class Topology:
    """A slice, or several that are joined by the data centre's network.

    Args:
        chip: What each of its chips can do.
        shape: Chips along each axis of the torus, such as "16x16".
        slices: How many.
    """

    chip: Chip
    shape: str
    slices: int = 1

    @property
    def name(self) -> str:
        """As it is written on the command line."""
        return f"{self.chip.name}:{self.shape}" + (f", {self.slices} slices" if self.slices > 1 else "")

    def devices(self) -> list[Any]:
        """Devices to build a mesh from; there is nothing behind them.

        Raises:
            InputError: libtpu is missing, or what is installed cannot describe this slice.
        """
        prepare_environment()
        from jax.experimental import topologies

        sizes = [int(size) for size in self.shape.split("x")]
        wrap = tuple(size % self.chip.wraps_at == 0 for size in sizes) + (False,) * (3 - len(sizes))
        options: dict[str, Any] = {"chip_config_name": "megacore"} if self.chip.name == "v5p" else {}
        if min(sizes[:2]) >= 2:
            options["chips_per_host_bounds"] = (2, 2, 1)
        try:
            description = topologies.get_topology_desc(
                platform="tpu",
                topology_name=f"{self.chip.prefix}:{self.shape}",
                wrap=wrap,
                num_slices=self.slices,
                **options,
            )
        except Exception as error:
            # JAX's own errors have no common class; the first line says what libtpu did not like.
            reason = str(error).splitlines()[0]
            raise InputError(
                f"--topology {self.name}: {installed()} cannot describe it ({reason}); slices that were tried with "
                f"jax 0.10.2 and libtpu 0.0.52 are: {known_slices()}"
            ) from None
        return list(description.devices)


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Read "v5e:16x16".

    Raises:
        InputError: an unknown chip or slice; the message lists the known.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", text)
    if not found or found[1] not in CHIPS or found[2] not in CHIPS[found[1]].slices:
        raise InputError(f"--topology {text!r} is unknown; known are: {known_slices()}")
    require_flag_count("--slices", slices, 1, _MOST_SLICES)
    return Topology(CHIPS[found[1]], found[2], slices)


def known_slices() -> str:
    """All that `parse_topology` reads."""
    return "; ".join(f"{chip.name}:{{{', '.join(chip.slices)}}}" for chip in CHIPS.values())


def installed() -> str:
    """The versions that compile, for messages."""
    return " with ".join(f"{package} {metadata.version(package)}" for package in ("jax", "libtpu"))


def prepare_environment() -> None:
    """What JAX and libtpu must find in the environment so that they compile for TPUs and use none.

    Raises:
        InputError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("libtpu, the compiler for TPUs, is not installed: pip install 'twingpt[tpu-plan]'")
    os.environ.update(
        JAX_PLATFORMS="cpu",  # nothing runs, and libtpu must not look for a TPU
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # two plans at once
        # Any names: without them libtpu complains at its start.
        TPU_ACCELERATOR_TYPE="v5e-4",
        TPU_WORKER_HOSTNAMES="localhost",
    )
