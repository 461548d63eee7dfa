"""Did two losses train the same model? Paired equivalence tests over seeds; numpy and scipy only."""
