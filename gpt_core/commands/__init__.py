"""The words and flags that `jax-gpt` and `torch-gpt` share, command by command."""
