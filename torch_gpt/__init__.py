"""The PyTorch twin: the same models and training through Hugging Face Accelerate. Never imports JAX."""
