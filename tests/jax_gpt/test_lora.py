"""What the compiled step of an adapter does not do: differentiate its base, or copy it."""

import re

import jax
import numpy as np

from gpt_core.parameters import parameter_table
from gpt_core.runs.config import RunConfig
from jax_gpt.sharding import create_mesh
from jax_gpt.step import create_program

MODEL = {
    "vocab_size": 307,
    "context_length": 16,
    "n_layers": 2,
    "n_heads": 2,
    "embed_dim": 24,
    "tied_embeddings": False,
}
ROWS = 2


def compiled(adapter: dict[str, object]) -> jax.stages.Compiled:
    config = RunConfig.from_dict(
        {"model": MODEL, "train": {"batch_size": ROWS}, "data": {"streams": 1}, "adapter": adapter}
    )
    program = create_program(config, create_mesh(config.jax.mesh, jax.devices()[:1]))
    dtypes = {"tokens": np.int32, "targets": np.int32, "mask": np.bool_}
    batch = {name: jax.ShapeDtypeStruct((ROWS, MODEL["context_length"]), dtype) for name, dtype in dtypes.items()}
    return program.step.lower(program.state, batch, np.float32(0)).compile()  # type: ignore[attr-defined]


def gradients_of_the_head(text: str) -> list[str]:
    return re.findall(r"= f32\[(?:24,307|307,24)\]\S* (?:dot|add|fusion)\(", text)


def test_no_gradient_of_the_frozen_head_is_made_and_the_base_stays_where_it_is() -> None:
    assert gradients_of_the_head(compiled({}).as_text()), "it would not be seen"
    step = compiled({"rank": 2})
    assert not gradients_of_the_head(step.as_text())
    base = sum(4 * row.size for row in parameter_table(RunConfig.from_dict({"model": MODEL}).model).values())
    assert step.memory_analysis().alias_size_in_bytes > base
