"""Drills: what is killed, full, slow or wrong, and what must be there afterwards.

Marked `faults` and run by `make faults`; a reduced form of each runs unmarked, with the ordinary tests.
"""
