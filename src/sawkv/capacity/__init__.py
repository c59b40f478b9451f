"""What fits on a GPU, predicted from a model's config.json before it starts: weights, KV cache, requests at once."""
