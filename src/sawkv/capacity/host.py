"""What host memory adds under vLLM's KV offloading: tokens that it holds, and what bringing a prefix back costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sawkv.capacity.caches import KVCache
from sawkv.capacity.memory import Setting, cut_blocks
from sawkv.capacity.model import ModelShape
from sawkv.errors import SawkvError

LINK: Final = 50e9
"""Bytes per second between host memory and one card, both ways apart: PCIe 5.0 x16 without its overhead."""
PREFIX: Final = 32768
"""Tokens of the prefix that is brought back, or the context if that is shorter."""
ALIGNMENT: Final = 4096
"""vLLM starts each block in host memory at a multiple of this (0.26 to 0.32: `SharedOffloadRegion`)."""


@dataclass(frozen=True)
class HostPlan:
    """Host memory behind the cards.

    Attributes:
        tokens: that host memory holds, beside those on the cards, in requests of the full context.
        prefix: tokens that are brought back.
        seconds: to bring them back, over the link of each card at once.
        break_even: tokens per second that a server must compute of a prompt, for computing to be as fast.
        computed: seconds to compute them at the speed that was given, or None.
    """

    tokens: int
    prefix: int
    seconds: float
    break_even: float
    computed: float | None


def make_host_plan(
    shape: ModelShape,
    setting: Setting,
    cache: KVCache,
    host_memory: int,
    *,
    prefill_speed: float | None = None,
) -> HostPlan:
    """Plan for `host_memory` bytes for all cards together, as vLLM's --kv-offloading-size.

    Args:
        shape: of the model.
        setting: options of vLLM.
        cache: how K and V are stored.
        host_memory: in bytes.
        prefill_speed: tokens of a prompt that the server computes per second, if known.

    Raises:
        SawkvError: prefill_speed is not above 0, or the model has recurrent states.
    """
    if prefill_speed is not None and not prefill_speed > 0:
        raise SawkvError(f"--prefill-speed: expected a rate above 0, got {prefill_speed}")
    if shape.states:
        raise SawkvError("--host-memory: expected a model of attention alone, got one with recurrent states")
    blocks, ranks = cut_blocks(shape, setting, cache), setting.tensor_parallel
    aligned = -(-blocks.nbytes * ranks // ALIGNMENT) * ALIGNMENT
    requests = host_memory // aligned / blocks.of_request
    prefix = min(PREFIX, setting.context)
    seconds = blocks.nbytes * blocks.of_request * prefix / setting.context / LINK / setting.pipeline_parallel
    return HostPlan(
        tokens=int(requests * setting.context),
        prefix=prefix,
        seconds=seconds,
        break_even=prefix / seconds,
        computed=None if prefill_speed is None else prefix / prefill_speed,
    )
