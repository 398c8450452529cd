"""Whole checkpoints: by path or hub name, in and out of every format, and what may be replaced by one."""
