"""What a process of a run on many hosts does when another one is gone."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ending_together() -> Iterator[None]:
    """Turns the errors of a connection that broke into one clear line and exit code 1.

    The process ends at once: JAX would otherwise wait for those that are gone before it lets go.
    """
    import jax
    from jax.errors import JaxRuntimeError

    try:
        yield
    except JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = " ".join(str(error).split())[:200]
        print(
            f"failed: process {jax.process_index()} of {jax.process_count()} lost another one, or the network between "
            f"them; nothing half written was left. The same command on all hosts goes on from the last checkpoint. "
            f"({reason})",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
