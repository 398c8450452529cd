"""`python -m torch_gpt` is `torch-gpt`."""

from gpt_core.entry import torch_gpt

if __name__ == "__main__":
    torch_gpt()
