"""Named intermediates of a model, kept where somebody asks for them: the sites of `gpt_core.sites`."""

import jax

Taps = dict[str, jax.Array]


def tap(taps: Taps | None, site: str, value: jax.Array) -> jax.Array:
    """Note a named intermediate where somebody asked for it; returns it as it is."""
    if taps is not None:
        taps[site] = value
    return value


def collect(taps: Taps | None, layer: int, layer_taps: Taps | None) -> None:
    """Move one block's intermediates into the model's, under their full path."""
    if taps is not None and layer_taps is not None:
        taps.update({f"blocks.{layer}.{site}": value for site, value in layer_taps.items()})
