"""Formats of fewer than four bits on the GPU backends, against the reference: `pytest -m gpu tests/gpu`. With
SAWKV_DRY_RUN=1, the CPU backend instead.
"""

from __future__ import annotations

import pytest

from sawkv.format.constants import BUCKET_SIZE
from tests.gpu.test_kernels import DEVICE, SEQ_LENS, backend, pytestmark, skip_unless_it_extends, skip_unless_supported
from tests.kernel_checks import BUCKET_OPTIONS, check_append, check_attention, check_buckets, check_gather

__all__ = ["backend", "pytestmark"]

SHAPES = [
    ("int3", 128),
    ("int2", 128),
    ("int4v3", 128),
    ("int4v2", 128),
    ("int3v2", 128),
    ("int3-k64-v0", 256),
    ("int2", 256),
    ("int3v2", 512),
    ("int2", 512),
    ("int4v2", 64),
    ("int2", 192),
    ("int3", 64),
    ("int3v2", 96),
    ("int2", 80),
]


def check_pages(backend: str, format_name: str, head_dim: int, page_size: int, query_lens: list[int]) -> None:
    """Attention over pages, which are prepared if they have 64 tokens."""
    prepared = page_size == 64
    check_attention(
        backend,
        DEVICE,
        format_name,
        SEQ_LENS,
        query_lens,
        head_dim=head_dim,
        page_size=page_size,
        centered=prepared,
        gained=prepared,
    )


@pytest.mark.parametrize(("format_name", "head_dim"), SHAPES)
@pytest.mark.parametrize("feedback", ["", "kv"])
def test_append(backend: str, format_name: str, head_dim: int, feedback: str) -> None:
    skip_unless_supported(backend, format_name, head_dim, 32)
    check_append(backend, DEVICE, format_name, head_dim, feedback=feedback)
    check_append(backend, DEVICE, format_name, head_dim, centered=True, gained=True, feedback=feedback, buckets=3)


@pytest.mark.parametrize(("format_name", "head_dim"), SHAPES)
def test_attention(backend: str, format_name: str, head_dim: int) -> None:
    skip_unless_supported(backend, format_name, head_dim, 64)
    for page_size, query_lens in ((16, [1] * 7), (64, [1] * 7), (128, [1, 1, 8, 3, 2, 5, 7])):
        check_pages(backend, format_name, head_dim, page_size, query_lens)


@pytest.mark.parametrize(("format_name", "group", "query_len"), [("int3", 8, 1), ("int2", 5, 4), ("int4v3", 16, 8)])
def test_query_shapes(backend: str, format_name: str, group: int, query_len: int) -> None:
    lengths, query_lens = [33, 1000, 9, 4000], [query_len] * 4
    check_attention(backend, DEVICE, format_name, lengths, query_lens, group=group, max_query_len=query_len)


@pytest.mark.parametrize(("format_name", "head_dim"), SHAPES)
def test_gather(backend: str, format_name: str, head_dim: int) -> None:
    skip_unless_supported(backend, format_name, head_dim)
    lengths = [5, 0, 33, 16, 1000, 0, 2, 700]
    for gained in (False, True):
        check_gather(backend, DEVICE, format_name, lengths, head_dim=head_dim, gained=gained, exact=backend != "cuda")


@pytest.mark.parametrize("query_lens", [[1, 16, 16, 16, 0, 5, 16], [1, 64, 70, 64, 16, 3, 100]])
@pytest.mark.parametrize(
    ("format_name", "head_dim"), [("int3", 128), ("int2", 128), ("int4v3", 128), ("int3v2", 128), ("int2", 64)]
)
def test_turns(backend: str, format_name: str, head_dim: int, query_lens: list[int]) -> None:
    skip_unless_it_extends(backend)
    for page_size in (16, 64):
        check_pages(backend, format_name, head_dim, page_size, query_lens)


@pytest.mark.parametrize("format_name", ["int3", "int2", "int4v3"])
def test_a_center_per_bucket(backend: str, format_name: str) -> None:
    check_buckets(backend, DEVICE, format_name=format_name, options=[BUCKET_OPTIONS[0], BUCKET_OPTIONS[-1]])
    lengths = [BUCKET_SIZE - 1, BUCKET_SIZE, 0, 3 * BUCKET_SIZE + 1]
    check_gather(backend, DEVICE, format_name, lengths, head_dim=128, buckets=2, exact=backend != "cuda")
