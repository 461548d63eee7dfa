"""Drills that kill processes, fill disks, slow down servers and damage files, and check what is left.

The mark `faults` selects them (`make faults`). A reduced form of each has no mark and runs with the other tests.
"""
