"""Predicts what fits on a GPU from a model's config.json: weights, KV cache, concurrent requests."""
