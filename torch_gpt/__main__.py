"""`python -m torch_gpt` is `torch-gpt`."""

import sys

from torch_gpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
