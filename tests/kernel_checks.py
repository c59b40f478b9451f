"""Checks that every kernel backend must pass, against the reference on the same device: fresh inputs, poison where
nothing may read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from sawkv import CacheFormat, PagedKVCache, PageLayout, append, decode_attention, gather
from sawkv.format.constants import BUCKET_SIZE
from sawkv.format.feedback import Feedback, channel_blocks, takes_from
from sawkv.kernels.constants import CLEARED_ROWS
from sawkv.kernels.cuda.queries import MAX_DECODE_QUERY_LEN
from tests.conftest import Batch, make_batch, random_vectors, relative_error

MAX_ERROR = 5e-3
"""Relative, of attention from 16-bit queries: what rounding weights and output to bf16 may cost."""
MAX_LSE_ERROR = 5e-3
"""Absolute. Four times as much where GPUs round more: the queries to bf16 if pages are of bf16, and keys to fp16 if
there are more than MAX_DECODE_QUERY_LEN query tokens.
"""


def random_feedback(num_kv_heads: int, head_dim: int, device: str) -> Feedback:
    """Weights of any 8 bits where there may be some. Heads in turn are moved by tenths of a code, by codes, and far
    beyond all codes.
    """
    weights = torch.randint(-128, 128, (num_kv_heads, head_dim, head_dim)) * takes_from(head_dim)
    step = torch.tensor([1e-5, 3e-4, 1e-2])[torch.arange(num_kv_heads) % 3] * (0.5 + torch.rand(num_kv_heads))
    return Feedback(weights.to(device, torch.int8), step.to(device))


def check_append(
    backend: str,
    device: str,
    format_name: str,
    head_dim: int,
    *,
    page_size: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    centered: bool = False,
    gained: bool = False,
    feedback: str = "",
    buckets: int = 1,
    num_tokens: int = 64,
) -> None:
    """Bytes equal the reference's, from strided rows of all magnitudes, with NaN and infinities, to permuted slots.

    feedback: which of K and V have it: "", "k", "v" or "kv".
    buckets: of positions, with a center of K each. Tokens stand in all of them and behind, and those without a slot
        anywhere.
    """
    layout = PageLayout(CacheFormat.parse(format_name), 3, head_dim, page_size)
    vectors = random_vectors(layout, device, centered, gained, buckets)
    feedbacks = {
        f"{which}_feedback": random_feedback(layout.rows.num_kv_heads, layout.rows.head_dim, device)
        for which in feedback
    }
    num_pages, num_rows = num_tokens // page_size + 3, num_tokens + 6
    pages = torch.empty(2, *layout.pages_shape(num_pages), dtype=torch.uint8, device=device)
    caches = [PagedKVCache(pages[i], layout, **vectors, **feedbacks) for i in range(2)]
    magnitudes = torch.logspace(-8, 4, num_rows)[:, None, None, None]
    fused = torch.randn(num_rows, 5, 3, head_dim) * magnitudes + torch.randn(num_rows, 1, 1, 1)
    fused[3] = 0
    fused[4] = 7.5
    if layout.format.quantized:  # the float formats leave the bits of a NaN open
        fused[5, :, 1, 2] = math.nan
        fused[6, :, 0, 0] = -math.inf
        fused[8] = 3e38 if dtype != torch.float16 else 6e4
        fused[10] = 1e30 * torch.randn(5, 3, head_dim)
    fused[7, :, 2, 0] = 1000
    fused[9, ..., ::2] *= -0.0
    k, v = fused.to(device, dtype)[:, 1], fused.to(device, dtype)[:, 3]  # strided views, as engines give them
    # Some are out of range on either side, and 6 tokens are padding.
    num_slots = num_pages * page_size
    slots = (torch.randperm(num_slots + 20)[:num_tokens] - 10).to(device)
    positions = torch.randint((buckets + 2) * BUCKET_SIZE, (num_rows,))
    positions[20:24] = torch.tensor([0, BUCKET_SIZE - 1, BUCKET_SIZE, buckets * BUCKET_SIZE])
    positions[num_tokens:] = 2**62
    positions = positions.to(device)
    positions[:num_tokens][(slots < 0) | (slots >= num_slots)] = -(2**62)
    for cache, name in zip(caches, (backend, "reference"), strict=True):
        cache.pages.fill_(0xAB)
        append(k, v, cache, slots, positions, backend=name)
    assert torch.equal(caches[0].pages, caches[1].pages)
    assert not (caches[0].pages == 0xAB).all()


def check_wrong_feedback_is_noticed(backend: str, device: str) -> None:
    """The control of `check_append`: with weights that are not quite those of the reference, bytes differ from its."""
    layout = PageLayout(CacheFormat("int4"), 2, 128, 16)
    right = random_feedback(2, 128, device)
    right = Feedback(right.weights, right.step[:1].repeat(2))  # tenths of a code
    k, v = torch.randn(2, 64, 2, 128, device=device)

    def written(feedback: Feedback | None, name: str) -> torch.Tensor:
        pages = torch.zeros(layout.pages_shape(4), dtype=torch.uint8, device=device)
        append(
            k,
            v,
            PagedKVCache(pages, layout, k_feedback=feedback, v_feedback=feedback),
            torch.arange(64, device=device),
            backend=name,
        )
        return pages

    want = written(right, "reference")
    assert torch.equal(written(right, backend), want)
    blocks, weights = channel_blocks(128).to(device), right.weights
    last, near = weights.clone(), weights.clone()
    last[:, blocks == 31] = 0
    near[:, blocks[:, None] // 4 == blocks // 4] = 0
    wrong = {
        "none": None,
        "transposed": Feedback(weights.mT.contiguous(), right.step),
        "of the other head": Feedback(weights.flip(0), right.step),
        "eight blocks further": Feedback(weights.roll(32, 1), right.step),
        "eight sources further": Feedback(weights.roll(8, 2), right.step),
        "without the last block": Feedback(last, right.step),
        "without neighbours": Feedback(near, right.step),
        "a little longer": Feedback(weights, right.step * 1.02),
    }
    for name, feedback in wrong.items():
        assert not torch.equal(written(feedback, backend), want), name


def check_feedback_ends_where_scales_saturate(backend: str, device: str) -> None:
    """Of rows whose largest scale is that of fp16, those within it take feedback, and those beyond do not."""
    layout = PageLayout(CacheFormat.parse("int4-k0-v0"), 2, 64, 16)
    scales = torch.tensor([65473, 65503, 65504 * (1 + 2**-20), 65510, 1e6], device=device)
    k, v = torch.rand(2, 5, 2, 64, device=device).clamp(0.02, 0.98)
    k[..., 3] = v[..., 5] = 0
    k[..., 9] = v[..., 8] = 1  # so that the range is 16 scales
    k, v = (x * (16 * scales)[:, None, None] for x in (k, v))
    pages = torch.zeros(3, *layout.pages_shape(1), dtype=torch.uint8, device=device)
    feedback = Feedback(random_feedback(2, 64, device).weights, torch.full((2,), 1e-3, device=device))  # by codes
    nothing = Feedback(torch.zeros_like(feedback.weights), feedback.step)
    for i, (name, used) in enumerate(((backend, feedback), ("reference", feedback), (backend, nothing))):
        cache = PagedKVCache(pages[i], layout, k_feedback=used, v_feedback=used)
        append(k, v, cache, torch.arange(5, device=device), backend=name)
    assert torch.equal(pages[0], pages[1])
    k_plane = slice(0, 16 * layout.k_row_bytes)
    differ = (pages[0] != pages[2])[0].flatten(1)[:, k_plane].view(2, 16, -1)[:, :5].any(-1)
    assert differ.tolist() == [[True, True, False, False, False]] * 2


def starts_of(lengths: Sequence[int], device: str) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def attend(
    batch: Batch, q: torch.Tensor, starts: torch.Tensor, backend: str, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp, poisoned beforehand. The reference gets fp32 queries and gives fp32."""
    if backend == "reference":
        q = q.float()
    out, lse = torch.full_like(q, math.nan), torch.full(q.shape[:2], math.nan, device=q.device)
    arguments = {"softmax_scale": q.shape[-1] ** -0.5, "out": out, "lse": lse} | options
    if "max_query_len" not in arguments:
        arguments["max_query_len"] = int(starts.diff().max())
    # type: ignore[arg-type]
    decode_attention(q, batch.cache, batch.block_table, batch.seq_lens, starts, backend=backend, **arguments)
    return out, lse


def check_attention(
    backend: str,
    device: str,
    format_name: str,
    seq_lens: Sequence[int],
    query_lens: Sequence[int],
    *,
    group: int = 4,
    head_dim: int = 128,
    num_kv_heads: int = 2,
    page_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    centered: bool = False,
    gained: bool = False,
    buckets: int = 1,
    **options: object,
) -> None:
    """Output and log-sum-exp of each sequence equal the reference's; rows of no sequence are left as they are."""
    layout = {"head_dim": head_dim, "num_kv_heads": num_kv_heads, "page_size": page_size}
    vectors = {"centered": centered, "gained": gained, "buckets": buckets}
    batch = make_batch(format_name, seq_lens, **layout, **vectors, device=device)
    starts = starts_of(query_lens, device)
    used = int(starts[-1])
    q = torch.randn(used + 2, 3, num_kv_heads * group, head_dim, device=device).to(dtype)[:, 1]  # strided
    got, want = (attend(batch, q, starts, name, **options) for name in (backend, "reference"))
    rounds_more = format_name.startswith("bf16") or max(query_lens) > MAX_DECODE_QUERY_LEN
    compare_attention(got, want, starts, MAX_LSE_ERROR * (4 if rounds_more else 1))


def compare_attention(
    got: tuple[torch.Tensor, torch.Tensor],
    want: tuple[torch.Tensor, torch.Tensor],
    starts: torch.Tensor,
    max_lse_error: float = MAX_LSE_ERROR,
    max_error: float = MAX_ERROR,
) -> None:
    """Of two results of `attend`."""
    bounds = starts.tolist()
    for start, end in itertools.pairwise(bounds):
        if want[0][start:end].any():
            error = relative_error(got[0][start:end], want[0][start:end])
            assert error <= max_error, f"query rows {start} to {end}: relative error {error:.1e}"
        else:
            assert not got[0][start:end].any(), "a query that sees no key gives zeros"
    torch.testing.assert_close(got[1][: bounds[-1]], want[1][: bounds[-1]], atol=max_lse_error, rtol=1e-4)
    assert got[0][bounds[-1] :].isnan().all(), "rows of no sequence are left as they are"


def check_gather(
    backend: str,
    device: str,
    format_name: str,
    seq_lens: Sequence[int],
    *,
    head_dim: int,
    page_size: int = 16,
    gained: bool = False,
    buckets: int = 1,
    exact: bool = True,
) -> None:
    """Rows equal the reference's, rotated and not, in fp32 and bf16. Those behind the last one are zero as far as a
    tile of attention may read; nothing else is written.

    exact: un-rotated rows too are equal to the last bit. Otherwise the rotation's sums may be taken in another order.
    """
    batch = make_batch(
        format_name,
        seq_lens,
        head_dim=head_dim,
        centered=True,
        gained=gained,
        buckets=buckets,
        page_size=page_size,
        device=device,
    )
    starts = starts_of([length + 3 * (i % 2) for i, length in enumerate(seq_lens)], device)
    total = int(starts[-1])
    # Room to spare, a little of it, and none: the last tokens do not fit and are dropped.
    for max_tokens in (total + CLEARED_ROWS + 5, total + 5, total - 4):
        for dtype in (torch.float32, torch.bfloat16):
            for rotated in (True, False):
                results = []
                for name in (backend, "reference"):
                    k, v = torch.full((2, total + CLEARED_ROWS + 5, 2, head_dim), -7.0, dtype=dtype, device=device)
                    gather(
                        batch.cache,
                        batch.block_table,
                        batch.seq_lens,
                        starts,
                        k[:max_tokens],
                        v[:max_tokens],
                        rotated=rotated,
                        backend=name,
                    )
                    results.append(torch.stack([k[:max_tokens], v[:max_tokens]]))
                    behind = results[-1][:, total:]
                    assert not behind[:, :CLEARED_ROWS].any()
                    assert (behind[:, CLEARED_ROWS:] == -7).all()
                if exact or rotated:
                    assert torch.equal(*results), (max_tokens, dtype, rotated)
                else:
                    assert torch.equal(*(result == -7 for result in results)), (
                        "rows of no sequence are left as they are"
                    )
                    assert relative_error(*results) < (1e-6 if dtype == torch.float32 else 2e-4), (max_tokens, dtype)


def check_gather_of_tails(backend: str, device: str, head_dim: int = 64, page_size: int = 16) -> None:
    """What is read from the middle of sequences, as with a sliding window, is that part of the whole, with centers of
    two buckets.
    """
    pages = BUCKET_SIZE // page_size
    lengths, skipped = [BUCKET_SIZE + 30, 2 * BUCKET_SIZE + 7, 3], [pages - 2, 2 * pages, 0]
    batch = make_batch("int4", lengths, head_dim=head_dim, page_size=page_size, centered=True, buckets=2, device=device)
    first = torch.tensor(skipped, dtype=torch.int32, device=device) * page_size
    table = torch.stack([row.roll(-skip) for row, skip in zip(batch.block_table, skipped, strict=True)])
    kept = batch.seq_lens - first
    bounds, tail_bounds = starts_of(lengths, device), starts_of(kept.tolist(), device)
    for rotated in (True, False):
        whole = torch.empty(2, sum(lengths), 2, head_dim, device=device)
        tails = torch.empty(2, int(kept.sum()), 2, head_dim, device=device)
        options = {"rotated": rotated, "first_positions": first}
        gather(batch.cache, batch.block_table, batch.seq_lens, bounds, *whole, rotated=rotated, backend="reference")
        gather(batch.cache, table, kept, tail_bounds, *tails, **options, backend=backend)
        want = [whole[:, end - n : end] for end, n in zip(bounds[1:].tolist(), kept.tolist(), strict=True)]
        assert relative_error(tails, torch.cat(want, 1)) < 1e-6


BUCKET_LENS = (1, BUCKET_SIZE - 1, BUCKET_SIZE, BUCKET_SIZE + 1, 3 * BUCKET_SIZE, 4 * BUCKET_SIZE + 70)
"""Lengths that end inside buckets, at their borders, and behind the last of three."""
BUCKET_OPTIONS: list[dict[str, object]] = [
    {},
    {"sliding_window": 1},
    {"sliding_window": BUCKET_SIZE - 1},
    {"sliding_window": BUCKET_SIZE + 100},
    {"logit_softcap": 20.0},
    {"sinks": True},
    {"sinks": True, "logit_softcap": 20.0, "sliding_window": 2 * BUCKET_SIZE},
]
"""For `check_buckets`. `sinks` stands for a tensor of them."""


def check_buckets(
    backend: str,
    device: str,
    *,
    format_name: str = "int4",
    head_dim: int = 128,
    group: int = 4,
    seq_lens: Sequence[int] = BUCKET_LENS,
    query_lens: Sequence[int] = (1, 4, 1, 3, 2, 8),
    page_size: int = 16,
    options: Sequence[dict[str, object]] = tuple(BUCKET_OPTIONS),
) -> None:
    """Attention equals the reference's where K has a center for each of three buckets. With the first two exchanged,
    the control, it does not.
    """
    layout = {"head_dim": head_dim, "page_size": page_size}
    batch = make_batch(format_name, seq_lens, **layout, centered=True, gained=True, buckets=3, device=device)
    starts = starts_of(query_lens, device)
    q = torch.randn(int(starts[-1]) + 1, 2 * group, head_dim, device=device) / 2
    sinks = torch.randn(2 * group, device=device)
    for given in options:
        wanted = given | ({"sinks": sinks} if "sinks" in given else {})
        got, want = (attend(batch, q, starts, name, **wanted) for name in (backend, "reference"))
        compare_attention(got, want, starts, 4 * MAX_LSE_ERROR)
        if given is options[0]:
            assert batch.cache.k_center is not None
            exchanged = replace(batch.cache, k_center=batch.cache.k_center[[1, 0, 2]].contiguous())
            control, _ = attend(replace(batch, cache=exchanged), q, starts, backend, **wanted)
            long = slice(int(starts[-2]), int(starts[-1]))
            assert relative_error(control[long], want[0][long]) > 10 * MAX_ERROR
