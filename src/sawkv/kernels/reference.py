"""The reference for all kernels: plain PyTorch in fp32 on any device, one sequence at a time."""

from __future__ import annotations

import torch

from sawkv.cache import PagedKVCache
from sawkv.format.codecs import CODECS
from sawkv.format.constants import MAX_SCALE, SEGMENT_BYTES
from sawkv.format.counters import is_sampled
from sawkv.format.layout import PageLayout
from sawkv.format.rotation import rotate
from sawkv.kernels import Layer, Prefixes, Schedule, Step
from sawkv.kernels.constants import CLEARED_ROWS

__all__ = ["Attention", "Pages", "Schedule", "counts", "name", "unsupported_reason"]

name = "reference"
counts = True


def unsupported_reason(device: torch.device, layout: PageLayout) -> str | None:
    """Always None: the reference runs every format on every device."""
    return None


class Pages:
    """See `sawkv.ops.Pages`."""

    def __init__(self, cache: PagedKVCache) -> None:
        self.cache = cache

    def append(
        self, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor, positions: torch.Tensor | None
    ) -> None:
        """See `sawkv.ops.append`."""
        cache, layout = self.cache, self.cache.layout
        num_tokens = slot_mapping.shape[0]
        kept = (slot_mapping >= 0) & (slot_mapping < cache.num_slots)
        page, offset = slot_mapping[kept] // layout.page_size, slot_mapping[kept] % layout.page_size
        k_codes, k_meta, v_codes, v_meta = planes(cache)
        k_center = cache.constants[0].center
        if k_center is not None:
            k_center = k_center[0 if positions is None else cache.bucket_of(positions[:num_tokens][kept])]
        for x, center, gain, order, feedback, codes, meta in (
            (k, k_center, cache.k_gain, layout.k_rotation_order, cache.k_feedback, k_codes, k_meta),
            (v, cache.v_center, cache.v_gain, layout.v_rotation_order, cache.v_feedback, v_codes, v_meta),
        ):
            rows = x[:num_tokens][kept].float()
            rows = rows if center is None else rows - center
            rows = rotate(rows if gain is None else rows * gain, order)
            codec = CODECS[layout.format.v_codec if codes is v_codes else layout.format.k_codec]
            new_codes, new_meta = codec.encode(rows, feedback)
            if cache.counters is not None:
                decoded = codec.decode(new_codes, new_meta)
                _count(cache.counters[int(codes is v_codes)], rows, decoded, new_meta, is_sampled(slot_mapping[kept]))
            if codes is v_codes:
                new_codes = swizzle_segments(new_codes, offset[:, None], layout)
            codes[page, :, offset] = new_codes
            if new_meta is not None:
                meta[page, :, offset] = new_meta.view(torch.uint8)

    def gather(self, prefixes: Prefixes, k_out: torch.Tensor, v_out: torch.Tensor, rotated: bool) -> None:
        """See `sawkv.ops.gather`."""
        seq_lens, cu_seq_lens = prefixes.seq_lens, prefixes.cu_seq_lens
        for i in range(seq_lens.shape[0]):
            start, length = int(cu_seq_lens[i]), int(seq_lens[i])
            keys, values = read_sequence(self.cache, prefixes.block_table[i], length)
            if not rotated:
                keys, values = restore(keys, values, self.cache)
            k_added, v_added = self.cache.added_by_gather(rotated)
            if k_added is not None:
                first = 0 if prefixes.first_positions is None else prefixes.first_positions[i]
                keys = keys + k_added[self.cache.bucket_of(first + torch.arange(length, device=keys.device))]
            if v_added is not None:
                values = values + v_added[0]
            rows = len(k_out[start : start + length])  # fewer at the end of the outputs
            k_out[start : start + rows] = keys[:rows].to(k_out.dtype)
            v_out[start : start + rows] = values[:rows].to(v_out.dtype)
        if len(seq_lens):
            behind = slice(int(cu_seq_lens[-1]), int(cu_seq_lens[-1]) + CLEARED_ROWS)
            k_out[behind] = v_out[behind] = 0


class Attention:
    """See `sawkv.ops.Attention`."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def __call__(self, q: torch.Tensor, step: Step, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        """See `sawkv.ops.Attention.__call__`."""
        layer, cache, layout = self.layer, self.layer.cache, self.layer.cache.layout
        query_start_loc, seq_lens = step.query_start_loc, step.seq_lens
        group = q.shape[1] // layout.num_kv_heads
        of_k, of_v = cache.constants
        q = q.float().view(-1, layout.num_kv_heads, group, layout.head_dim)
        rotated_q = rotate(q if of_k.gain_inverse is None else q * of_k.gain_inverse[:, None], layout.k_rotation_order)
        for i in range(seq_lens.shape[0]):
            start, end, length = int(query_start_loc[i]), int(query_start_loc[i + 1]), int(seq_lens[i])
            keys, values = read_sequence(cache, step.block_table[i], length)
            for token in range(start, end):
                last = length - (end - token)  # position of this query, which sees keys `first` to `last`
                first = max(0, last + 1 - layer.sliding_window) if layer.sliding_window else 0
                visible = slice(first, max(last + 1, first))
                scores = torch.einsum("hgd,khd->hgk", rotated_q[token], keys[visible]) * layer.softmax_scale
                # Centering removed q.k_center from all scores; a cap, a sink, the log-sum-exp and buckets need it.
                if of_k.center is not None:
                    center = of_k.center[cache.bucket_of(torch.arange(visible.start, visible.stop, device=q.device))]
                    scores = scores + torch.einsum("hgd,khd->hgk", q[token], center) * layer.softmax_scale
                if layer.logit_softcap:
                    scores = layer.logit_softcap * torch.tanh(scores / layer.logit_softcap)
                if layer.sinks is not None:  # takes part in the softmax, and has no value
                    scores = torch.cat([scores, layer.sinks.float().view(layout.num_kv_heads, group, 1)], -1)
                total = torch.logsumexp(scores, -1, keepdim=True)
                # A query that sees no key gives zeros, and a log-sum-exp of -inf (or of its sink alone).
                weights = (scores - total).exp()[..., : visible.stop - visible.start]
                attended = rotate(torch.einsum("hgk,khd->hgd", weights, values[visible]), layout.v_rotation_order)
                if of_v.gain_inverse is not None:
                    attended = attended * of_v.gain_inverse[:, None]
                if of_v.center is not None:
                    attended = attended + of_v.center[0, :, None] * weights.sum(-1, keepdim=True)
                out[token] = attended.flatten(0, 1).to(out.dtype)
                if lse is not None:
                    lse[token] = total.flatten()


def _count(
    counters: torch.Tensor, rows: torch.Tensor, decoded: torch.Tensor, meta: torch.Tensor | None, sampled: torch.Tensor
) -> None:
    """Add rows to one line of the counters.

    Args:
        rows, decoded: [num_tokens, num_kv_heads, head_dim] fp32.
        sampled: [num_tokens] bool.
    """
    finite = decoded.isfinite().all(-1)
    saturated = torch.zeros_like(finite) if meta is None else meta[..., 0] == MAX_SCALE
    used = (finite & ~saturated & sampled[:, None])[..., None]
    error, norm = (decoded - rows).where(used, 0), rows.where(used, 0)
    counts = (torch.ones_like(finite), ~finite, saturated, error.double() ** 2, norm.double() ** 2, used)
    counters += torch.stack([count.sum(dtype=torch.float64) for count in counts])


def restore(keys: torch.Tensor, values: torch.Tensor, cache: PagedKVCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo rotation and gain of rows [num_tokens, num_kv_heads, head_dim] fp32."""
    restored = []
    orders = cache.layout.k_rotation_order, cache.layout.v_rotation_order
    for rows, order, constants in zip((keys, values), orders, cache.constants, strict=True):
        x = rotate(rows, order)
        restored.append(x if constants.gain_inverse is None else x * constants.gain_inverse)
    return restored[0], restored[1]


def read_sequence(cache: PagedKVCache, block_table_row: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode the first `length` tokens of one sequence, and leave them centered, scaled and rotated.

    Returns:
        K and V, each [length, num_kv_heads, head_dim] fp32.
    """
    layout = cache.layout
    position = torch.arange(length, device=cache.pages.device)
    page, offset = block_table_row[position // layout.page_size].long(), position % layout.page_size
    k_codes, k_meta, v_codes, v_meta = planes(cache)
    k = k_codes[page, :, offset]
    v = swizzle_segments(v_codes[page, :, offset], offset[:, None], layout)
    decoded = []
    for name, codes, meta in ((layout.format.k_codec, k, k_meta), (layout.format.v_codec, v, v_meta)):
        row = CODECS[name].decode(codes, meta[page, :, offset].view(torch.float16) if layout.meta_bytes else None)
        decoded.append(row.view(length, layout.num_kv_heads, layout.head_dim))
    return decoded[0], decoded[1]


def planes(cache: PagedKVCache) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of K codes, K meta, V codes and V meta, each [num_pages, num_kv_heads, page_size, bytes] uint8."""
    layout = cache.layout

    def plane(offset: int, width: int) -> torch.Tensor:
        shape = (*cache.pages.shape[:2], layout.page_size, width)
        return cache.pages.as_strided(
            shape, (*cache.pages.stride()[:2], width, 1), cache.pages.storage_offset() + offset
        )

    return (
        plane(0, layout.k_row_bytes),
        plane(layout.k_meta_offset, layout.meta_bytes),
        plane(layout.v_codes_offset, layout.v_row_bytes),
        plane(layout.v_meta_offset, layout.meta_bytes),
    )


def swizzle_segments(rows: torch.Tensor, offset: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Permute the 16-byte segments of V rows between channel order and stored order. The permutation is its own
    inverse.

    Args:
        rows: [..., v_row_bytes] uint8.
        offset: position of each row in its page, broadcastable to rows.shape[:-1].
    """
    multiplier, period = layout.swizzle_factors
    if period == 1:
        return rows
    segments = rows.view(*rows.shape[:-1], layout.v_row_bytes // SEGMENT_BYTES, SEGMENT_BYTES)
    index: torch.Tensor = (
        torch.arange(segments.shape[-2], device=rows.device) ^ ((offset * multiplier // 8) % period)[..., None]
    )
    return segments.gather(-2, index[..., None].expand_as(segments)).flatten(-2)
