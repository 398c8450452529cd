"""Text for both frameworks."""
