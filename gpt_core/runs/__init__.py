"""Training runs: their config, folder, numbers, end, and sweeps of them."""
