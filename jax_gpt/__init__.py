"""The JAX twin: Flax NNX models and `jit`-sharded training. Never imports PyTorch."""
