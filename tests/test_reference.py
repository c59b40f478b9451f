# Over 400 lines: an independent implementation, and what the reference is held to by it.
"""The reference backend against attention written independently, in fp64 over what `gather` reads."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from sawkv import CacheFormat, LayoutError, PagedKVCache, PageLayout, UnsupportedError, append, decode_attention, gather
from sawkv.format.constants import BUCKET_SIZE
from sawkv.format.feedback import Feedback, fit_feedback
from sawkv.format.rotation import hadamard_matrix, rotate
from sawkv.kernels import reference
from tests.conftest import Batch, make_batch, relative_error
from tests.kernel_checks import random_feedback

LENGTHS = [1, 0, 15, 16, 17, 33, 64]


def attend_fp64(
    batch: Batch,
    q: torch.Tensor,
    starts: list[int],
    window: int = 0,
    cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Textbook attention over the decoded cache, restored first: shares no attention code with any backend. Output and
    log-sum-exp.
    """
    cache, layout = batch.cache, batch.cache.layout
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    for i, length in enumerate(batch.seq_lens.tolist()):
        if not length:
            continue
        k_rot, v_rot = torch.empty(2, length, layout.num_kv_heads, layout.head_dim)
        starts_at = torch.tensor([0, length], dtype=torch.int32)
        gather(
            cache, batch.block_table[i : i + 1], batch.seq_lens[i : i + 1], starts_at, k_rot, v_rot, backend="reference"
        )
        k, v = rotate(k_rot, layout.k_rotation_order).double(), rotate(v_rot, layout.v_rotation_order).double()
        k, v = (x if gain is None else x / gain.double() for x, gain in ((k, cache.k_gain), (v, cache.v_gain)))
        k, v = (
            x if center is None else x + center.double() for x, center in ((k, cache.k_center), (v, cache.v_center))
        )
        queries = range(starts[i], starts[i + 1])
        for row in queries:
            position = length - (starts[i + 1] - row)
            if position < 0:
                continue
            first = max(0, position - window + 1) if window else 0
            for head in range(q.shape[1]):
                kv_head = head * layout.num_kv_heads // q.shape[1]
                scores = k[first : position + 1, kv_head] @ q[row, head].double() * layout.head_dim**-0.5
                scores = cap * torch.tanh(scores / cap) if cap else scores
                total = scores.exp().sum() + (0 if sinks is None else sinks[head].double().exp())
                weights, lse[row, head] = scores.exp() / total, total.log()
                out[row, head] = weights @ v[first : position + 1, kv_head]
    return out, lse


@pytest.mark.parametrize(
    "format_name", ["int4", "int4-k16-v64", "int3v2", "int8-k0-v0", "bf16", "fp16-k128-v128", "fp32-k64-v64"]
)
@pytest.mark.parametrize(
    "options", [{}, {"window": 7}, {"cap": 3.0}, {"sinks": True}, {"cap": 3.0, "sinks": True, "window": 7}]
)
def test_decode_attention(format_name: str, options: dict[str, object]) -> None:
    head_dim = 512 if format_name == "int4-k16-v64" else 128
    batch = make_batch(
        format_name,
        LENGTHS,
        head_dim=head_dim,
        centered=format_name == "int4",
        gained=format_name.startswith(("int4", "fp16")),
    )
    query_lens = [1, 1, 3, 2, 1, 8, 2]
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    q = torch.randn(int(starts[-1]), 6, head_dim) / 3
    window, cap = int(options.get("window", 0)), float(options.get("cap", 0.0))  # type: ignore[call-overload, arg-type]
    sinks = torch.randn(6) if "sinks" in options else None
    out, lse = torch.full_like(q, math.nan), torch.full(q.shape[:2], math.nan)
    got = decode_attention(
        q,
        batch.cache,
        batch.block_table,
        batch.seq_lens,
        starts.int(),
        softmax_scale=head_dim**-0.5,
        max_query_len=8,
        sliding_window=window,
        logit_softcap=cap,
        sinks=sinks,
        out=out,
        lse=lse,
        backend="reference",
    )
    want, want_lse = attend_fp64(batch, q, starts.tolist(), window, cap, sinks)
    assert relative_error(got, want) < 1e-5
    seen = want_lse > -math.inf  # not those of an empty sequence, which may still have a sink
    torch.testing.assert_close(lse[seen].double(), want_lse[seen], atol=1e-4, rtol=1e-5)
    assert not got[1].any(), "a sequence of no tokens gives zeros"


def test_the_check_above_can_fail() -> None:
    batch = make_batch("int4", [40], gained=True)
    q = torch.randn(1, 2, 128)
    want, _ = attend_fp64(batch, q, [0, 1])
    batch.cache.pages[batch.block_table[0, 1]] = batch.cache.pages[batch.block_table[0, 1]].roll(1)
    assert not relative_error(attend_fp64(batch, q, [0, 1])[0], want) < 1e-3


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_centers_of_buckets_do_not_change_what_is_read(backend: str) -> None:
    """Of 32-bit pages: attention is that over K and V as they were given, and `gather` gives those back. Rotated rows
    lack the same center in all buckets.
    """
    lengths, head_dim, query_len = [2 * BUCKET_SIZE + 40, BUCKET_SIZE], 64, 3
    batch = make_batch(
        "fp32-k16-v16", lengths, head_dim=head_dim, dtype=torch.float32, centered=True, gained=True, buckets=2
    )
    cache, starts = batch.cache, torch.tensor([0, 3, 6], dtype=torch.int32)
    q, sinks = torch.randn(6, 4, head_dim), torch.randn(4)
    for window, cap, sink in ((0, 0.0, None), (0, 5.0, None), (BUCKET_SIZE + 9, 0.0, sinks), (7, 5.0, sinks)):
        lse = torch.empty(6, 4)
        got = decode_attention(
            q,
            cache,
            batch.block_table,
            batch.seq_lens,
            starts,
            softmax_scale=head_dim**-0.5,
            max_query_len=query_len,
            sliding_window=window,
            logit_softcap=cap,
            sinks=sink,
            lse=lse,
            backend=backend,
        )
        for i, length in enumerate(lengths):
            k, v = (x[i].double().repeat_interleave(2, 1) for x in (batch.k, batch.v))
            mine = slice(3 * i, 3 * i + query_len)
            scores = torch.einsum("qhd,khd->hqk", q[mine].double(), k) * head_dim**-0.5
            scores = cap * torch.tanh(scores / cap) if cap else scores
            ahead = torch.arange(length) - torch.arange(length - query_len, length)[:, None]
            hidden = (ahead > 0) | (ahead <= -window if window else torch.tensor(False))
            scores = scores.masked_fill(hidden, -math.inf)
            total = scores if sink is None else torch.cat([scores, sink[:, None, None].expand(-1, 3, -1)], -1)
            want = torch.einsum("hqk,khd->qhd", (scores - total.logsumexp(-1, keepdim=True)).exp(), v)
            assert relative_error(got[mine], want) < 1e-5
            torch.testing.assert_close(lse[mine].double(), total.logsumexp(-1).T, atol=1e-4, rtol=1e-5)
    bounds, total = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32), sum(lengths)
    k, v, k_rotated, v_rotated = torch.empty(4, total, 2, head_dim)
    gather(cache, batch.block_table, batch.seq_lens, bounds, k, v, rotated=False, backend=backend)
    gather(cache, batch.block_table, batch.seq_lens, bounds, k_rotated, v_rotated, backend=backend)
    assert cache.k_center is not None
    assert cache.k_gain is not None
    unrotated = rotate(k_rotated, 16) / cache.k_gain + cache.k_center[0]
    for restored in (k, unrotated):
        torch.testing.assert_close(restored, torch.cat(batch.k), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(v, torch.cat(batch.v), atol=1e-4, rtol=1e-5)
    with pytest.raises(LayoutError, match="positions: expected those of the tokens"):
        append(k[:1], v[:1], cache, torch.zeros(1, dtype=torch.int64), backend=backend)
    slots = torch.arange(2)
    with pytest.raises(LayoutError, match="positions: expected 2, one for each slot, got 1"):
        append(k[:2], v[:2], cache, slots, slots[:1], backend=backend)


@pytest.mark.parametrize("options", [{"cap": 3.0}, {"sinks": torch.full((2,), 1.0)}])
def test_a_cap_and_sinks_see_the_center_of_keys(options: dict[str, Any]) -> None:
    """The control of `test_decode_attention`: without K's center the output is another there, and without them it is
    not.
    """
    batch = make_batch("fp32", [40], centered=True)
    q, starts = torch.randn(1, 2, 128), torch.tensor([0, 1], dtype=torch.int32)
    arguments = {"softmax_scale": 128**-0.5, "max_query_len": 1, "backend": "reference"}
    lost = replace(batch.cache, k_center=None)
    taken = {"logit_softcap": options.get("cap", 0.0), "sinks": options.get("sinks")}
    for others, differs in (({}, False), (taken, True)):
        want, got = (
            decode_attention(q, cache, batch.block_table, batch.seq_lens, starts, **arguments, **others)
            for cache in (batch.cache, lost)
        )
        assert (relative_error(got, want) > 1e-2) == differs


@pytest.mark.parametrize("which", ["k_gain", "v_gain"])
def test_attention_with_another_gain_is_another(which: str) -> None:
    batch = make_batch("int4", [40], gained=True)
    q, starts = torch.randn(1, 2, 128), torch.tensor([0, 1], dtype=torch.int32)
    options = {"softmax_scale": 128**-0.5, "max_query_len": 1, "backend": "reference"}
    want, _ = attend_fp64(batch, q, [0, 1])
    gain = getattr(batch.cache, which)
    for other in (None, gain.reciprocal(), gain.flip(0), gain.roll(1, 1)):
        cache = replace(batch.cache, **{which: other})
        assert (
            relative_error(decode_attention(q, cache, batch.block_table, batch.seq_lens, starts, **options), want) > 0.1
        )


def test_lse_is_the_natural_log_of_the_sum() -> None:
    batch = make_batch("fp32", [5])
    q, lse = torch.randn(1, 2, 128), torch.empty(1, 2)
    args = (q, batch.cache, batch.block_table, batch.seq_lens, torch.tensor([0, 1], dtype=torch.int32))
    decode_attention(*args, softmax_scale=0.1, max_query_len=1, lse=lse, backend="reference")
    scores = torch.einsum("hd,khd->hk", q[0], batch.k[0].float()) * 0.1
    torch.testing.assert_close(lse[0], scores.logsumexp(-1))


def test_gains_take_errors_from_channels_that_need_them_small() -> None:
    """Rows of one loud channel: divided by their size, each channel errs by its own size; and they are read back as
    they were.
    """
    layout = PageLayout(CacheFormat("int4"), 2, 128, 16)
    size = torch.ones(2, 128)
    size[:, 7] = 100
    k = torch.randn(160, 2, 128) * size
    table, length, start = (
        torch.arange(10, dtype=torch.int32)[None],
        torch.tensor([160]).int(),
        torch.tensor([0, 160]).int(),
    )
    errors = []
    for gain in (None, 1 / size):
        cache = PagedKVCache.allocate(layout, 10, k_gain=gain, v_gain=gain)
        append(k, k, cache, torch.arange(160), backend="reference")
        read = torch.empty(2, 160, 2, 128)
        gather(cache, table, length, start, *read, rotated=False, backend="reference")
        quiet = torch.arange(128) != 7
        errors += [relative_error(x[..., quiet], k[..., quiet]) for x in read]
    plain, gained = errors[:2], errors[2:]
    assert max(gained) < 0.15
    assert min(plain) > 2 * max(gained), "the control"


def test_gains_of_one_change_no_byte() -> None:
    batch = make_batch("int4", [40], centered=True)
    ones = torch.ones(2, 128)
    cache = replace(batch.cache, pages=torch.full_like(batch.cache.pages, 0xFF), k_gain=ones, v_gain=ones)
    position = torch.arange(40)
    slots = batch.block_table[0, position // 16].long() * 16 + position % 16
    append(batch.k[0], batch.v[0], cache, slots, backend="reference")
    assert torch.equal(cache.pages, batch.cache.pages)


def test_the_inverse_of_a_gain_is_rounded_once() -> None:
    gain = torch.exp2(20 * torch.rand(2, 128) - 10)
    cache = PagedKVCache.allocate(PageLayout(CacheFormat("int4"), 2, 128, 16), 1, v_gain=gain)
    inverse = cache.constants[1].gain_inverse
    assert inverse is not None
    want = [nearest_fp32(1 / Fraction(float(x))) for x in gain.flatten()]
    assert inverse.flatten().tolist() == want
    assert cache.constants[0].gain_inverse is None


def test_vectors_that_do_not_fit_are_refused() -> None:
    cache = PagedKVCache.allocate(PageLayout(CacheFormat("int4"), 2, 128, 16), 1)
    ones = torch.ones(2, 128)
    for name in ("k_center", "v_center", "k_gain", "v_gain"):
        for wrong in (ones.double(), torch.ones(1, 128), torch.ones(128, 2).T):
            with pytest.raises(LayoutError, match=f"{name}: expected contiguous float32 \\[2, 128\\]"):
                replace(cache, **{name: wrong})
        with pytest.raises(LayoutError, match=f"{name}: expected device cpu, got meta"):
            replace(cache, **{name: ones.to("meta")})
    for bad in (0.0, -1.0, math.inf, math.nan):
        wrong = ones.clone()
        wrong[1, 5] = bad
        for name in ("k_gain", "v_gain"):
            with pytest.raises(LayoutError, match=f"{name}: expected positive and finite values"):
                replace(cache, **{name: wrong})


def test_error_against_the_exact_values_is_that_of_the_codec() -> None:
    errors = {}
    for name in ("int4-k0-v0", "int4-k128-v128", "int8-k128-v128"):
        torch.manual_seed(0)
        batch = make_batch(name, [200])
        batch.k[0][:, :, 7] += 20  # not stored: the error below must be large
        k, v = torch.empty(2, 200, 2, 128)
        gather(
            batch.cache,
            batch.block_table,
            batch.seq_lens,
            torch.tensor([0, 200], dtype=torch.int32),
            k,
            v,
            backend="reference",
        )
        layout = batch.cache.layout
        assert relative_error(rotate(k, layout.k_rotation_order), batch.k[0]) > 0.3
        errors[name] = relative_error(rotate(v, layout.v_rotation_order), batch.v[0])
    assert errors["int8-k128-v128"] < 0.015
    assert errors["int4-k128-v128"] < 0.2


def test_nan_stays_in_its_own_token_and_head() -> None:
    batch = make_batch("int4", [20, 20])
    page = batch.block_table[0, 0]
    slot = int(page) * 16 + 10
    k, v = torch.randn(2, 1, 2, 128)
    v[0, 1, 3] = math.nan
    append(k, v, batch.cache, torch.tensor([slot]), backend="reference")
    q = torch.randn(24, 4, 128)
    starts = torch.tensor([0, 20, 24], dtype=torch.int32)
    out = decode_attention(
        q,
        batch.cache,
        batch.block_table,
        batch.seq_lens,
        starts,
        softmax_scale=0.1,
        max_query_len=20,
        backend="reference",
    )
    bad = out.isnan().all(-1)
    assert torch.equal(bad, out.isnan().any(-1))
    assert bad[10:20, 2:].all(), "queries at and after the token, in the heads of its KV head"
    bad[10:20, 2:] = False
    assert not bad.any()


def nearest_fp32(x: Fraction) -> float:
    """Rounded once, half to even."""
    about = np.float32(float(x))
    near = (np.nextafter(about, np.float32(-np.inf)), about, np.nextafter(about, np.float32(np.inf)))
    return float(min(near, key=lambda y: (abs(Fraction(float(y)) - x), int(y.view(np.uint32)) % 2)))


def codes_by_the_rule(
    y: list[float], scale: float, zero_point: float, weights: list[list[int]], step: float
) -> list[int]:
    """Step 5 of docs/format.md, one channel after the other, in exact arithmetic."""
    inverse, codes, errors = nearest_fp32(1 / Fraction(scale)), [0] * len(y), [0] * len(y)
    block_of = [8 * (c // 32) + c % 8 for c in range(len(y))]
    for j in sorted(range(len(y)), key=lambda c: block_of[c]):
        total = sum(weights[j][i] * errors[i] for i in range(len(y)) if block_of[i] < block_of[j])
        t = nearest_fp32(Fraction(y[j]) * Fraction(inverse) + Fraction(zero_point))
        t = nearest_fp32(total * Fraction(step) + Fraction(t))
        codes[j] = min(max(round(Fraction(t)), 0), 15)  # half to even
        errors[j] = min(max(round((Fraction(t) - codes[j]) * 64), -127), 127)
    return codes


def meta_by_the_rule(y: list[float]) -> tuple[float, float]:
    """Steps 3 and 4 of docs/format.md with feedback: scale and zero point."""
    low, high = min(y), max(y)
    by_range = Fraction(nearest_fp32(Fraction(high) - Fraction(low))) / 16
    wanted = max(by_range, Fraction(max(abs(low), abs(high))) / 1024, Fraction(1, 2**24))
    scale = np.float16(float(wanted))
    if Fraction(float(scale)) < wanted:
        scale = np.nextafter(scale, np.float16(np.inf))
    product = nearest_fp32(Fraction(low) * Fraction(nearest_fp32(1 / Fraction(float(scale)))))
    zero_point = min(max(nearest_fp32(Fraction(-1, 2) - Fraction(product)), -1024.0), 1024.0)
    return float(scale), float(np.float16(zero_point))


@pytest.mark.parametrize("head_dim", [16, 48, 80, 128])
def test_feedback_is_the_rule(head_dim: int) -> None:
    layout = PageLayout(CacheFormat.parse("int4-k0-v0"), 3, head_dim, 16)
    feedback = random_feedback(3, head_dim, "cpu")
    cache = PagedKVCache.allocate(layout, 1, k_feedback=feedback)
    k = torch.randn(4, 3, head_dim) * torch.tensor([1e-6, 1, 30, 1e5])[:, None, None] + torch.randn(4, 3, 1)
    append(k, k, cache, torch.arange(4), backend="reference")
    k_codes, k_meta, v_codes, v_meta = (plane[0, :, :4] for plane in reference.planes(cache))
    assert int((k_meta == v_meta).all(-1).sum()) < 6, (
        "the control: V has no feedback, and a wider scale but where its offset asks for one"
    )
    v_codes = reference.swizzle_segments(v_codes, torch.arange(4), layout)
    as_v = 0
    for head in range(3):
        weights, step = feedback.weights[head].tolist(), float(feedback.step[head])
        for token in range(4):
            scale, zero_point = meta_by_the_rule(k[token, head].tolist())
            assert k_meta[head, token].view(torch.float16).tolist() == [scale, zero_point]
            codes = codes_by_the_rule(k[token, head].tolist(), scale, zero_point, weights, step)
            want = torch.tensor(
                [low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)], dtype=torch.uint8
            )
            assert torch.equal(k_codes[head, token], want)
            as_v += torch.equal(v_codes[head, token], want)
    assert as_v < 9, "the control: V has no feedback"


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_rows_that_take_no_feedback(poison: float) -> None:
    """Those that are not finite, or whose scale saturates; and they change no row beside them."""
    layout = PageLayout(CacheFormat("int4"), 2, 64, 16)
    feedback = random_feedback(2, 64, "cpu")
    nothing = Feedback(torch.zeros_like(feedback.weights), feedback.step)
    plain, moved = (
        PagedKVCache(torch.zeros(layout.pages_shape(1), dtype=torch.uint8), layout, k_feedback=f, v_feedback=f)
        for f in (nothing, feedback)
    )
    clean = replace(moved, pages=moved.pages.clone())
    k = torch.randn(3, 2, 64)
    append(k, k, clean, torch.arange(3), backend="reference")
    k[1, 0, 5] = poison
    for cache in (plain, moved):
        append(k, k, cache, torch.arange(3), backend="reference")
    for poisoned, alone, without in zip(*map(reference.planes, (moved, clean, plain)), strict=True):
        assert torch.equal(poisoned[0, 0, 1], without[0, 0, 1])
        others = torch.ones(2, 16, dtype=torch.bool)
        others[0, 1] = False
        assert torch.equal(poisoned[0][others], alone[0][others])


@pytest.mark.parametrize("head_dim", [80, 128])
def test_fitted_feedback_makes_errors_cost_less(head_dim: int) -> None:
    """Errors of scores of queries that lie mostly in some directions. What reads the pages knows of no feedback."""
    layout = PageLayout(CacheFormat("int4").resolve(head_dim), 2, head_dim, 16)
    spread = torch.logspace(0, -2, head_dim)[:, None] * torch.linalg.qr(torch.randn(2, head_dim, head_dim))[0]
    q = torch.randn(2, 4000, head_dim) @ spread
    h = torch.block_diag(*[hadamard_matrix(layout.k_rotation_order)] * (head_dim // layout.k_rotation_order))
    feedback = fit_feedback(h @ (q.mT @ q / 4000).double() @ h)
    backwards = Feedback(-feedback.weights, feedback.step)
    k = torch.randn(512, 2, head_dim) * (0.2 + torch.rand(head_dim))
    table, length, start = (
        torch.arange(32, dtype=torch.int32)[None],
        torch.tensor([512]).int(),
        torch.tensor([0, 512]).int(),
    )
    costs, errors, values = [], [], []
    for used in (None, feedback, backwards):
        cache = PagedKVCache(torch.zeros(layout.pages_shape(32), dtype=torch.uint8), layout, k_feedback=used)
        append(k, k, cache, torch.arange(512), backend="reference")
        read = torch.empty(2, 512, 2, head_dim)
        gather(PagedKVCache(cache.pages, layout), table, length, start, *read, rotated=False, backend="reference")
        costs.append(float(torch.einsum("hqd,khd->hqk", q, read[0] - k).square().mean()))
        errors.append(relative_error(read[0], k))
        values.append(read[1])
    assert costs[1] < 0.5 * costs[0]
    assert costs[2] > costs[0], "the control"
    assert errors[0] < errors[1] < 2 * errors[0], "the errors themselves grow"
    assert torch.equal(values[0], values[1]), "V has no feedback"


@pytest.mark.parametrize("offset", [0.0, 3.0, -40.0, 1e4])
def test_feedback_of_no_weight_rounds_to_the_nearest_of_sixteen_cells(offset: float) -> None:
    """Wherever the row lies: its error is half a step of a 16th of its range, where fp16 holds the zero point well
    enough.
    """
    layout = PageLayout(CacheFormat.parse("int4-k0-v0"), 2, 128, 16)
    nothing = Feedback(torch.zeros(2, 128, 128, dtype=torch.int8), torch.ones(2))
    cache = PagedKVCache.allocate(layout, 1, k_feedback=nothing)
    k = torch.randn(16, 2, 128) + offset
    append(k, k, cache, torch.arange(16), backend="reference")
    read, plain = reference.read_sequence(cache, torch.tensor([0]), 16)
    peak = k.abs().amax(-1, keepdim=True)
    step = torch.maximum((k.amax(-1, keepdim=True) - k.amin(-1, keepdim=True)) / 16, peak / 1024)
    zero_point_error = 2**-11 * (peak / step + 1)  # in codes: half a step of fp16
    assert bool(((read - k).abs() <= step * (1 + 2**-10) * (0.5 + 1e-3 + zero_point_error)).all())
    if abs(offset) < 10:  # 15 steps to the range are coarser, in the mean of squares by (16 / 15)^2
        ratio = ((read - k).square().mean() / (plain - k).square().mean()).item()
        assert abs(ratio - (15 / 16) ** 2) < 0.06


def test_feedback_that_does_not_fit_is_refused() -> None:
    weights, step = torch.zeros(2, 128, 128, dtype=torch.int8), torch.zeros(2)
    for wrong in (weights.float(), weights[0], weights[:, :64], weights.mT):
        with pytest.raises(LayoutError, match="feedback weights: expected contiguous int8"):
            Feedback(wrong, step)
    for wrong in (step.double(), torch.zeros(3), torch.zeros(2, 1), torch.zeros(4)[::2]):
        with pytest.raises(LayoutError, match="feedback step: expected contiguous float32 \\[2\\]"):
            Feedback(weights, wrong)
    with pytest.raises(LayoutError, match="on one device, got cpu and meta"):
        Feedback(weights, step.to("meta"))
    for name, (codec, head_dim), message in (
        ("k_feedback", ("int8", 128), "k_feedback: expected a format below 8 bits, got int8-k128-v128"),
        ("v_feedback", ("bf16", 128), "v_feedback: expected a format below 8 bits, got bf16"),
        ("v_feedback", ("int4", 64), "v_feedback: expected weights \\[2, 64, 64\\] on cpu, got \\[2, 128, 128\\]"),
    ):
        cache = PagedKVCache.allocate(PageLayout(CacheFormat(codec), 2, head_dim, 16), 1)
        with pytest.raises(LayoutError, match=message):
            replace(cache, **{name: Feedback(weights, step)})


@pytest.mark.parametrize("slot", [-1, -7, 3 * 16, 2**40])
def test_slots_outside_are_skipped(slot: int) -> None:
    batch = make_batch("int4", [])
    before = batch.cache.pages.clone()
    append(torch.randn(2, 2, 128), torch.randn(2, 2, 128), batch.cache, torch.tensor([slot, -1]), backend="reference")
    assert torch.equal(batch.cache.pages, before)


def test_bad_arguments_are_named() -> None:
    batch = make_batch("int4", [4])
    cache, k = batch.cache, torch.randn(4, 2, 128)
    slots = torch.arange(4)
    bad_appends = [
        ("k: expected .* got bfloat16 \\[4, 2, 64\\]", (k[..., :64].bfloat16(), k[..., :64].bfloat16(), cache, slots)),
        ("k: expected .* got float64", (k.double(), k.double(), cache, slots)),
        ("slot_mapping: expected int64", (k, k, cache, slots.int())),
        ("at most 4 slots", (k, k, cache, torch.arange(5))),
        ("k: expected a contiguous last dimension", (k.mT.contiguous().mT, k, cache, slots)),
        ("slot_mapping: expected a contiguous last dimension", (k, k, cache, torch.arange(8).view(4, 2)[:, 0])),
        ("equal shapes", (k, k[:3], cache, slots)),
    ]
    for message, args in bad_appends:
        with pytest.raises(LayoutError, match=message):
            append(*args)
    q = torch.randn(1, 3, 128)
    with pytest.raises(LayoutError, match="a multiple of num_kv_heads 2 heads, got 3"):
        decode_attention(
            q,
            cache,
            batch.block_table,
            batch.seq_lens,
            torch.tensor([0, 1], dtype=torch.int32),
            softmax_scale=1,
            max_query_len=1,
        )
    starts = torch.tensor([[0, 0], [1, 0]], dtype=torch.int32)[:, 0]
    with pytest.raises(LayoutError, match="query_start_loc: expected a contiguous last dimension"):
        decode_attention(
            torch.randn(1, 2, 128), cache, batch.block_table, batch.seq_lens, starts, softmax_scale=1, max_query_len=1
        )
    with pytest.raises(LayoutError, match="16-byte aligned"):
        PagedKVCache(
            cache.pages.flatten()[8 : -cache.layout.span_bytes * 2 + 8].view(-1, *cache.pages.shape[1:]), cache.layout
        )
    with pytest.raises(UnsupportedError, match="expected one of cuda, triton, cpu, reference, got 'fast'"):
        append(k, k, cache, slots, backend="fast")
