"""The parity harness: converts weights between the twins and proves that they are the same function.

Only this package knows both frameworks. It imports each of them lazily, inside the modules that run them, and
works on a machine that has one of them or neither.
"""
