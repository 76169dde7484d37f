"""Side-by-side measurements: each module is a command that prints a table and, with --json, writes its figures.

Only ratios between things that were measured in turn in the same run mean anything; machines are noisy.
"""
