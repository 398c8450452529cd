"""`python -m jax_gpt` is `jax-gpt`."""

from gpt_core.entry import jax_gpt

if __name__ == "__main__":
    jax_gpt()
