"""The audit: it compares gradients and values of a loss and a reference to decide whether they are one function."""
