"""The audit of declared losses, each in a subprocess."""
