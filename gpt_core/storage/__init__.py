"""Weights as arrays in files: the canonical parameters, safetensors and Orbax, one tensor at a time."""
