"""Paired equivalence tests over seeds: do two losses train the same model? Uses numpy and scipy only."""
