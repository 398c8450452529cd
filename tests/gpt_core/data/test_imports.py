import subprocess
import sys

PROGRAM = """
import sys
for name in ("jax", "torch", "grain", "datasets", "pyarrow"):
    sys.modules[name] = None  # importing it fails
from gpt_core.data.loader import training_batches
from gpt_core.data.config import DataConfig
with training_batches(DataConfig(streams=1), 2, 16) as batches:
    print(next(batches)["tokens"].shape)
"""


def test_data_needs_no_framework_and_no_extra() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(2, 16)"
