import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_gpt.loss import chunked_loss

ROWS, TIME, WIDTH, VOCAB = 2, 7, 4, 11


def example() -> tuple[np.ndarray, ...]:
    """Hidden states, a table of tokens, targets, and a mask that leaves some out."""
    random = np.random.default_rng(0)
    hidden, table = random.normal(size=(ROWS, TIME, WIDTH)), random.normal(size=(VOCAB, WIDTH))
    return hidden, table, random.integers(0, VOCAB, (ROWS, TIME)), random.random((ROWS, TIME)) < 0.7


@pytest.mark.parametrize("chunk", [1, 3, TIME, 20])
def test_chunks_have_loss_and_gradients_of_the_whole(chunk: int, x64: None) -> None:
    """By hand: the gradient of the logits is the probabilities less one at the target."""
    hidden, table, targets, mask = example()
    logits = hidden @ table.T
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.eye(VOCAB)[targets]
    weight = 0.3
    expected = -weight * (mask * np.log((probabilities * chosen).sum(-1))).sum()
    of_logits = 2 * weight * mask[..., None] * (probabilities - chosen)  # the loss is doubled below

    def doubled(hidden: jax.Array, table: jax.Array) -> jax.Array:
        return 2 * chunked_loss(lambda x: x @ table.T, hidden, jnp.asarray(targets), jnp.asarray(mask), chunk, weight)

    plain = chunked_loss(
        lambda x: x @ jnp.asarray(table).T, jnp.asarray(hidden), jnp.asarray(targets), jnp.asarray(mask), chunk, weight
    )
    found, gradients = jax.value_and_grad(doubled, argnums=(0, 1))(jnp.asarray(hidden), jnp.asarray(table))
    np.testing.assert_allclose([plain, found / 2], expected, rtol=1e-14)
    np.testing.assert_allclose(gradients[0], of_logits @ table, atol=1e-14)
    np.testing.assert_allclose(gradients[1], np.einsum("btv,bte->ve", of_logits, hidden), atol=1e-14)


def test_logits_are_made_once() -> None:
    """Three products with the head in a loop over chunks: logits, and the gradients of both factors."""
    hidden, table, targets, mask = (jnp.asarray(x) for x in example())

    def loss(hidden: jax.Array, table: jax.Array) -> jax.Array:
        return chunked_loss(lambda x: x @ table.T, hidden, targets, mask, 2)

    assert str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, table)).count("dot_general") == 3
