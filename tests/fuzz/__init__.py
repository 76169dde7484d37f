"""Fuzzers of what strangers send: `python -m tests.fuzz TARGET --seconds N`."""
