"""The audit: is a loss the same function as a reference, judged by gradients and values."""
