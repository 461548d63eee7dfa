"""Audit of declared losses, each in a subprocess."""
