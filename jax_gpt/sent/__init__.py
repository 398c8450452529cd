"""One file for each thing that devices send each other in a step; `jax_gpt/layout.py` has the table of them."""
