"""`python -m jax_gpt` is `jax-gpt`."""

import sys

from jax_gpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
