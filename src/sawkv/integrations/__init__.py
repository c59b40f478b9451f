"""Engines: one package each. Nothing else in sawkv imports an engine."""
