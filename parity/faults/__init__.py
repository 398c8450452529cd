"""Planted faults, to prove that the checks can fail."""
