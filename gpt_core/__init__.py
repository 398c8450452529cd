"""What both frameworks must agree on, written once and without either of them.

This package imports NumPy and ordinary libraries, never JAX or PyTorch.
"""
