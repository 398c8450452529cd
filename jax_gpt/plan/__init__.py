"""Planning a training run for a TPU slice without owning one."""
