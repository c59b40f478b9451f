"""Predicts what fits on a GPU from a model's config.json: weights, KV cache, concurrent requests."""

from __future__ import annotations

from typing import Final

COMMON_CONTEXT: Final = 16384
"""Tokens of the longest request, unless a plan is asked for another."""
CPU_BLOCK: Final = 128
"""Tokens per block on a CPU, in vLLM's own caches and ours."""
