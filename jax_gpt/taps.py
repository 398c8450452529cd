"""Named intermediates of a model, kept where somebody asks for them: the sites of `gpt_core.sites`."""

import jax

Taps = dict[str, jax.Array]


class Kept(dict[str, jax.Array]):
    """Taps that hold on to the sites with some endings alone; everything else is free as soon as it is used."""

    def __init__(self, *endings: str) -> None:
        super().__init__()
        self.endings = endings

    def __setitem__(self, site: str, value: jax.Array) -> None:
        if site.endswith(self.endings):
            super().__setitem__(site, value)


def of_block(taps: Taps | None) -> Taps | None:
    """Taps of the same kind, for one block of a model; None where nobody asked."""
    return Kept(*taps.endings) if isinstance(taps, Kept) else None if taps is None else {}


def tap(taps: Taps | None, site: str, value: jax.Array) -> jax.Array:
    """Note a named intermediate where somebody asked for it; returns it as it is."""
    if taps is not None:
        taps[site] = value
    return value


def collect(taps: Taps | None, layer: int, layer_taps: Taps | None) -> None:
    """Move one block's intermediates into the model's, under their full path."""
    if taps is not None and layer_taps is not None:
        taps.update({f"blocks.{layer}.{site}": value for site, value in layer_taps.items()})
