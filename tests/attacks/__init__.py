"""Hostile input, kept for ever: each must be refused, with the right reason."""
