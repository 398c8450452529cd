"""Training runs of both frameworks: side by side, and crossing from one to the other."""
