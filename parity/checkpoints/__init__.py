"""Checkpoints by name, from format to format, and what lies in them."""
