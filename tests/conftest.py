"""Shared helpers: caches filled by one backend and read by another."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sawkv import CacheFormat, PagedKVCache, PageLayout, append

REPOSITORY = Path(__file__).parents[1]
MODEL = next((REPOSITORY / "models").glob("sawkv-*"), REPOSITORY / "models")
"""The shipped model."""
LONGEST = ("vllm/", "test_device_code.py", "test_triton_backend.py")


def pytest_configure() -> None:
    """Programs in the background of a shell, or under nohup, ignore these signals, and so would what tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that the processes of `make test` end together."""
    items.sort(key=lambda item: not item.nodeid.removeprefix("tests/").startswith(LONGEST))


def random_vectors(
    layout: PageLayout, device: str, centered: bool = True, gained: bool = True, buckets: int = 1
) -> dict[str, torch.Tensor]:
    """Centers and gains of K and V, by the names of `PagedKVCache`; gains are from 1/2 to 2. With several buckets of
    positions K has a center for each, 3 times as long.
    """
    shape = layout.num_kv_heads, layout.head_dim
    centers = {name: torch.randn(shape, device=device) for name in ("k_center", "v_center") if centered}
    if centered and buckets > 1:
        centers["k_center"] = 3 * torch.randn(buckets, *shape, device=device)
    return centers | {
        name: torch.exp2(2 * torch.rand(shape, device=device) - 1) for name in ("k_gain", "v_gain") if gained
    }


@dataclass
class Batch:
    """A cache that holds `seq_lens` tokens of random K and V in permuted pages; all else in it is poison (0xFF bytes:
    NaN scales).
    """

    cache: PagedKVCache
    k: list[torch.Tensor]
    v: list[torch.Tensor]
    block_table: torch.Tensor
    seq_lens: torch.Tensor


def make_batch(
    format_name: str,
    seq_lens: Sequence[int],
    *,
    head_dim: int = 128,
    num_kv_heads: int = 2,
    page_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    centered: bool = False,
    gained: bool = False,
    buckets: int = 1,
    backend: str = "reference",
    device: str = "cpu",
) -> Batch:
    """Fresh random inputs, appended in one call by `backend`. With several buckets, rows of K and V lie around their
    bucket's center.
    """
    layout = PageLayout(CacheFormat.parse(format_name), num_kv_heads, head_dim, page_size)
    pages_of = [-(-length // page_size) for length in seq_lens]
    num_pages = sum(pages_of) + 3
    vectors = random_vectors(layout, device, centered, gained, buckets)
    cache = PagedKVCache.allocate(layout, num_pages, device, **vectors)
    cache.pages.fill_(0xFF)
    free = torch.randperm(num_pages).tolist()
    block_table = torch.full((len(seq_lens), max([*pages_of, 1]) + 2), 2**30, dtype=torch.int32)
    slots = []
    for i, (length, count) in enumerate(zip(seq_lens, pages_of, strict=True)):
        block_table[i, :count] = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
        position = torch.arange(length)
        slots.append(block_table[i, position // page_size].long() * page_size + position % page_size)
    total = sum(seq_lens)
    spread = 0.2 + 3 * torch.rand(2, num_kv_heads, head_dim)
    k, v = (
        (torch.randn(total, num_kv_heads, head_dim) * spread[i] + spread[1 - i]).to(device, dtype) for i in range(2)
    )
    positions = torch.cat([torch.arange(length) for length in [0, *seq_lens]]).to(device)
    if buckets > 1:
        around = cache.constants[0].center[cache.bucket_of(positions)].to(dtype)
        k, v = k + around, v + around
    slot_mapping = torch.cat([*slots, torch.empty(0, dtype=torch.int64)]).to(device)
    append(k, v, cache, slot_mapping, positions, backend=backend)
    lengths = list(seq_lens)
    seq_lens_tensor = torch.tensor(lengths, dtype=torch.int32, device=device)
    return Batch(cache, list(k.split(lengths)), list(v.split(lengths)), block_table.to(device), seq_lens_tensor)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want|; NaN or Inf in `got` never passes a comparison."""
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.fixture(autouse=True)
def _fresh_but_reproducible_inputs(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(sum(map(ord, request.node.nodeid)))
