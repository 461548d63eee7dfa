"""One trial: set-up, audit, training, conclusion."""
