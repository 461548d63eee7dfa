"""Softmax classifiers: inputs of a loss, losses, metrics, test batches, mutants and a 50-digit oracle."""
