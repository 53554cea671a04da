"""Measurements: compiled cascades beside their peers, timed in the same process. `python -m benchmarks --help`."""
