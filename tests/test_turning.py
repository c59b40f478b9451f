"""How keys turn, found from keys alone; and centers that follow."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sawkv.format.constants import BUCKET_SIZE
from sawkv.prepare.corpus import passes
from sawkv.prepare.statistics import LayerStatistics
from sawkv.prepare.turning import MAX_BUCKETS, SHIFTS, bucketed_context, buckets_in, find_turning
from tests.conftest import relative_error

HEADS, HEAD_DIM, CONTEXT = 2, 64, 4 * BUCKET_SIZE


def rope(keys: torch.Tensor, positions: torch.Tensor, turned: int, base: float, style: str) -> torch.Tensor:
    """RoPE written as models write it, in fp64."""
    angles = positions.double()[:, None] * base ** (-torch.arange(0, turned, 2).double() / turned)
    out = keys.double().clone()
    if style == "halves":
        first, second = (slice(0, turned // 2), slice(turned // 2, turned))
    else:
        first, second = (slice(0, turned, 2), slice(1, turned, 2))
    a, b = keys[..., first].double(), keys[..., second].double()
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
    return out


@pytest.mark.parametrize(
    ("head_dim", "turned", "style"),
    [
        (64, 64, "halves"),
        (64, 64, "pairs"),
        (64, 32, "halves"),
        (80, 32, "halves"),
        (64, 16, "pairs"),
        (64, 0, "halves"),
    ],
)
@pytest.mark.parametrize("base", [1e4, 1e6])
def test_turning_is_found_in_rounded_keys(head_dim: int, turned: int, style: str, base: float) -> None:
    keys = torch.randn(32, HEADS, head_dim) + 2 * torch.randn(HEADS, head_dim)
    places = torch.arange(32)
    turning = find_turning([rope(keys, places + p, turned, base, style).to(torch.bfloat16) for p in (0, *SHIFTS)])
    assert turning is not None
    positions = torch.tensor([0, 5, 1000, 7777])
    got = turning.turn(keys[:4], positions)
    torch.testing.assert_close(got, rope(keys[:4], positions, turned, base, style), rtol=0.02, atol=0.02)
    torch.testing.assert_close(turning.turn(got, -positions), keys[:4].double())


def test_keys_that_do_something_else_have_no_turning() -> None:
    """Keys that have nothing in common; and RoPE whose angles change at a length, as LongRoPE's do."""
    assert find_turning([torch.randn(32, HEADS, HEAD_DIM) for _ in (0, *SHIFTS)]) is None
    keys, places = torch.randn(32, HEADS, HEAD_DIM), torch.arange(32)
    bases = [1e4 if shift < 4096 else 2e4 for shift in (0, *SHIFTS)]
    longer = [rope(keys, places + p, HEAD_DIM, base, "halves") for p, base in zip((0, *SHIFTS), bases, strict=True)]
    assert find_turning(longer[:5]) is not None
    assert find_turning(longer) is None


def test_contexts_of_any_length() -> None:
    """Probes lie within the context, and one bucket needs none. Buckets have an upper bound. Under M-RoPE, where an
    image shifts the positions of what follows, there are none.
    """
    assert [buckets_in(n) for n in (0, 1, BUCKET_SIZE, BUCKET_SIZE + 1, 10**7)] == [1, 1, 1, 2, MAX_BUCKETS]
    for context, window, last in ((BUCKET_SIZE, 512, None), (5000, 512, 4096), (4127, 512, 512), (10**6, 20, 32768)):
        found = passes(torch.arange(3 * window).view(3, -1), torch.zeros(3, window, dtype=torch.int64), context)
        probes = [each for each in found if each.is_probe]
        assert len(found) == len(probes) + 3
        assert all(each.ids.tolist() == list(range(min(32, window))) for each in probes)
        assert (int(probes[-1].positions[0]) if probes else None) == last
        assert all(int(each.positions[-1]) < context for each in probes)
    mrope = {"rope_type": "default", "mrope_section": [16, 24, 24]}
    for rope_parameters, want in (
        ({"rope_theta": 1e6}, 5000),
        (mrope, 0),
        ({"full_attention": mrope}, 0),
        (None, 5000),
    ):
        assert bucketed_context(SimpleNamespace(rope_parameters=rope_parameters), 5000) == want


@pytest.mark.parametrize("turned", [HEAD_DIM, 0])
def test_centers_follow_a_static_part_of_keys(turned: int) -> None:
    """From a few windows, in buckets without any too. Keys that do not turn have the same center everywhere."""
    bias, text = 4 * torch.randn(HEADS, HEAD_DIM), torch.randn(32, HEADS, HEAD_DIM)
    statistics = LayerStatistics(HEADS, HEAD_DIM, "cpu", context=CONTEXT)
    windows = [torch.cat([torch.arange(4), start + torch.arange(4, 256)]) for start in (0, 3000, 6144)]
    for each in passes(torch.zeros(3, 256, dtype=torch.int64), torch.stack(windows), CONTEXT):
        n = len(each.ids)
        k = bias + (text if each.is_probe else 0.1 * torch.randn(n, HEADS, HEAD_DIM))
        k = rope(k, each.positions, turned, 1e6, "halves")
        statistics.add(
            torch.randn(n, HEADS, HEAD_DIM), k, torch.randn(n, HEADS, HEAD_DIM), each.positions, each.is_probe
        )
    assert statistics.rows == [256 + 4 + 4, 252, 0, 252]
    assert statistics.centers.shape == (4, 2, HEADS, HEAD_DIM)
    for bucket in range(4):
        places = bucket * BUCKET_SIZE + torch.arange(BUCKET_SIZE)
        want = rope(bias.expand(BUCKET_SIZE, -1, -1), places, turned, 1e6, "halves").mean(0)
        torch.testing.assert_close(statistics.centers[bucket, 0].double(), want, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("turned", [HEAD_DIM, 0])
def test_queries_count_as_at_positions_all_over_the_context(turned: int) -> None:
    """Though windows stand at its start. Queries of models that do not turn them count as they are."""
    bias, text = 4 * torch.randn(2 * HEADS, HEAD_DIM), torch.randn(32, HEADS, HEAD_DIM)
    statistics = LayerStatistics(HEADS, HEAD_DIM, "cpu", context=CONTEXT)
    places = torch.arange(512)
    found = []
    for each in passes(torch.zeros(2, 512, dtype=torch.int64), places.expand(2, -1), CONTEXT):
        n = len(each.ids)
        q = bias + torch.randn(n, 2 * HEADS, HEAD_DIM)
        if not each.is_probe:
            found.append(q)
        k = text if each.is_probe else torch.randn(n, HEADS, HEAD_DIM)
        q, k = (rope(x, each.positions, turned, 1e6, "halves").float() for x in (q, k))
        statistics.add(q, k, torch.randn(n, HEADS, HEAD_DIM), each.positions, each.is_probe)
    spread = (CONTEXT * torch.linspace(0, 1, 1024).square()).long()
    want = rope(torch.cat(found)[torch.randperm(1024)], spread, turned, 1e6, "halves")
    want = want.view(1024, HEADS, 2, HEAD_DIM).transpose(0, 1).flatten(1, 2)
    assert relative_error(statistics.query_gram, want.mT @ want) < 0.05
    start = rope(torch.cat(found), places.repeat(2), turned, 1e6, "halves")
    start = start.view(1024, HEADS, 2, HEAD_DIM).transpose(0, 1).flatten(1, 2)
    assert (relative_error(statistics.query_gram, start.mT @ start) > 0.2) == (turned > 0)
