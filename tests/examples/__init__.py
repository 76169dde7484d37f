"""Tests of the runnable stories."""
