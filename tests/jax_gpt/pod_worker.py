"""Not a test: one process of a run of several, or the whole of a run. Started by `test_train.py`.

Usage: pod_worker.py DEVICES GATHERED DIES ARGUMENTS...
The weights of every save, gathered in training, go to GATHERED. When the save of step DIES is complete, the process
kills itself; the others are in the next step by then.
"""

import os
import signal
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={sys.argv[1]}"

import jax  # the flags come first
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from gpt_core.runs.saved import StepRecord
from jax_gpt.cli import main
from jax_gpt.run_checkpoint import RunCheckpoints
from jax_gpt.step import TrainState

save = RunCheckpoints.save


def gather_and_save(self: RunCheckpoints, state: TrainState, record: StepRecord) -> None:
    arrays = {
        ".".join(map(str, path)): multihost_utils.process_allgather(variable[...], tiled=True)
        for path, variable in nnx.to_flat_state(state.parameters)
    }
    if jax.process_index() == 0 and sys.argv[2] != "-":
        np.savez(f"{sys.argv[2]}-{record.step}.npz", **arrays)
    save(self, state, record)
    if sys.argv[3] == str(record.step):
        self.wait()
        os.kill(os.getpid(), signal.SIGKILL)


RunCheckpoints.save = gather_and_save  # type: ignore[method-assign]
sys.exit(main(sys.argv[4:]))
