"""The grid of variants: its cases, both twins of each, every check, every fault."""
