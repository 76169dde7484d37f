"""Tests of identity and trust."""
