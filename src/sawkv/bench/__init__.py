"""Caches of one model under load, on the machine at hand: served by vLLM, asked by its load generator."""
