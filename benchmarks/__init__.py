"""Timings. Nothing here is a test, and no test depends on time."""
