"""Every method: its bits, what makes it token-wise, and what its file claims."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sawkv import CacheFormat, FormatError, PagedKVCache, PageLayout, append, gather
from sawkv.format.feedback import fit_feedback
from sawkv.format.rotation import rotate
from sawkv.lab.methods import METHODS, find_method
from sawkv.lab.methods.feedback import FedBack
from sawkv.lab.methods.hessian import HessianAware
from sawkv.lab.methods.integer import Coded
from sawkv.lab.methods.kmeans import KMeans
from sawkv.lab.methods.lloyd_max import LloydMax, gaussian_levels
from sawkv.lab.methods.low_rank import LowRank
from sawkv.lab.methods.outliers import Outliers
from sawkv.lab.methods.range_search import RangeSearched
from sawkv.lab.samples import LayerSample, Sample
from sawkv.prepare.fit import fit
from sawkv.prepare.states import Reader
from sawkv.prepare.statistics import LayerStatistics
from tests.conftest import relative_error

NAMES = [*METHODS, "bf16", "int8", "int4-k16-v0", "int4-k64-v64"]
BY_TILE = ("kvarn", "channel_keys")
"""Starts of the names of methods that store several tokens together (test_rivals.py)."""
BITS = {
    "prepared": 4.25,
    "prepared_int4v3": 3.75,
    "prepared_int3": 3.25,
    "prepared_int4v2": 3.25,
    "prepared_int2": 2.25,
    "fp8": 8,
    "vllm_int4_per_token_head": 4.25,
    "int8_plain": 8.25,
    "bf16": 16,
    "int4_outliers": 5,
    "kmeans": 4.125,
    "svd_bf16": 4.25,
    "svd_int8": 4.25,
    "lloyd_max": 4.125,
    "q4_0_rotated": 4.5,
    "channel_keys_g64": 4.5,
    "kvarn_codes": (4 + 32 / 128 + 16 / 128 + 2 + 32 / 128 + 16 / 128) / 2,
    "oscar_codes": 2.25,
}


def make_sample(num_tokens: int = 400, num_kv_heads: int = 2, head_dim: int = 128, offset: float = 0.0) -> LayerSample:
    """Rows with channels of different sizes, an offset in two channels, and correlated queries."""
    spread = 0.3 + 2 * torch.rand(num_kv_heads, head_dim)
    rows = torch.randn(2, num_tokens, num_kv_heads, head_dim) * spread
    rows[..., 5] += offset
    rows[..., 5 + head_dim // 2] -= offset
    mix = torch.randn(num_kv_heads, head_dim, head_dim) / head_dim**0.5
    hessian = mix @ torch.diag_embed(torch.rand(num_kv_heads, head_dim) ** 4) @ mix.mT
    statistics = LayerStatistics(num_kv_heads, head_dim, "cpu")
    root = torch.linalg.cholesky(hessian + 1e-4 * torch.eye(head_dim))
    # [head_dim, heads * head_dim], whose columns' Gram matrix it is
    statistics.set_output_weight(root.mT.permute(1, 0, 2).flatten(1))
    queries = torch.einsum("thd,hcd->thc", torch.randn(num_tokens, num_kv_heads, head_dim), root)
    statistics.add(queries, rows[0], rows[1])
    return LayerSample(Sample(rows[0], hessian), Sample(rows[1], hessian), statistics)


def fitted(name: str, sample: LayerSample) -> tuple[Reader, Reader]:
    return find_method(name).fit(sample)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(BY_TILE)])
def test_reads_are_token_wise_and_pure(name: str) -> None:
    """A row read alone, or among others, or in another order, is the same: so one pass reads what
    decoding would read.
    """
    sample = make_sample(offset=3.0)
    for read, part in zip(fitted(name, sample), (sample.k, sample.v), strict=True):
        rows = part.rows[:50]
        before = rows.clone()
        whole = read(rows)
        assert torch.equal(rows, before)
        assert whole.shape == rows.shape
        assert whole.dtype == torch.float32
        assert bool(whole.isfinite().all())
        order = torch.randperm(50)
        torch.testing.assert_close(read(rows[order]), whole[order], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(read(rows[7:8]), whole[7:8], rtol=1e-4, atol=1e-4)
        limit = 0.9 if name.startswith(("svd", "prepared_", "oscar")) else 0.25
        assert relative_error(whole, rows) < limit, "stored rows bear no likeness to what was stored"


@pytest.mark.parametrize("name", NAMES)
def test_zeros_and_large_rows_stay_finite(name: str) -> None:
    sample = make_sample()
    for read in fitted(name, sample):
        assert bool(read(torch.zeros(3, 2, 128)).isfinite().all())
        assert bool(read(1e4 * torch.randn(3, 2, 128)).isfinite().all())


def test_bits() -> None:
    for name, bits in BITS.items():
        assert find_method(name).bits(128) == bits
    assert find_method("int4").bits(64) == 4.5


def through_pages(sample: LayerSample, name: str, **constants: Any) -> torch.Tensor:
    """K and V of a sample of 40 tokens, written to pages of a format and read back: [2, 40, 2, 128] fp32."""
    cache = PagedKVCache.allocate(PageLayout(CacheFormat.parse(name), 2, 128, 16), 3, **constants)
    append(sample.k.rows, sample.v.rows, cache, torch.arange(40), backend="reference")
    out = torch.empty(2, 40, 2, 128)
    pages, lengths, starts = (torch.tensor(x, dtype=torch.int32) for x in ([[0, 1, 2]], [40], [0, 40]))
    gather(cache, pages, lengths, starts, out[0], out[1], rotated=False, backend="reference")
    return out


@pytest.mark.parametrize("name", ["int4-k128-v128", "int4-k16-v0", "int8", "int4-k0-v64", "bf16-k32-v32"])
def test_served_formats_read_what_pages_give_back(name: str) -> None:
    """The method is the product's own arithmetic: `append`, then `gather`, to the last bit."""
    sample = make_sample(num_tokens=40)
    for read, part, want in zip(fitted(name, sample), (sample.k, sample.v), through_pages(sample, name), strict=True):
        assert torch.equal(read(part.rows), want)


def test_centered_formats_read_what_pages_with_centers_give_back() -> None:
    sample = make_sample(num_tokens=40, offset=20.0)
    k_center, v_center = (part.rows.mean(0) for part in (sample.k, sample.v))
    out = through_pages(sample, "int4", k_center=k_center, v_center=v_center)
    for read, part, want in zip(fitted("int4_center", sample), (sample.k, sample.v), out, strict=True):
        assert torch.equal(read(part.rows), want)


def test_feedback_reads_what_pages_written_with_it_give_back() -> None:
    sample = make_sample(num_tokens=40, offset=20.0)
    parts = [sample.k, sample.v]
    feedback = [fit_feedback(rotate(rotate(part.hessian, 128).mT, 128)) for part in parts]
    centers = [part.rows.mean(0) for part in parts]
    constants = dict(zip(("k_center", "v_center", "k_feedback", "v_feedback"), (*centers, *feedback), strict=True))
    out = through_pages(sample, "int4", **constants)
    plain = fitted("int4_center", sample)
    for read, without, part, want in zip(fitted("int4_center_feedback", sample), plain, parts, out, strict=True):
        assert torch.equal(read(part.rows), want)
        assert not torch.equal(without(part.rows), want)


def test_centering_removes_an_offset_that_rotation_spreads() -> None:
    sample = make_sample(offset=60.0)
    error = {
        name: relative_error(fitted(name, sample)[0](sample.k.rows), sample.k.rows)
        for name in ("int4_center", "int4-k128-v128")
    }
    assert error["int4_center"] < 0.3 * error["int4-k128-v128"]


def test_range_search_beats_min_and_max() -> None:
    rows = torch.randn(300, 2, 128)
    sample = make_sample().k
    plain, searched = (relative_error(q.fit(sample)(rows), rows) for q in (Coded("int4"), RangeSearched()))
    assert searched < 0.96 * plain
    skewed = rows.exp()
    per_row = [(q.fit(sample)(skewed) - skewed).norm(dim=-1) for q in (Coded("int4"), RangeSearched())]
    assert bool((per_row[1] <= per_row[0] * 1.02).all())


def test_lloyd_max_levels_are_the_known_ones() -> None:
    """Max (1960): 16 levels of N(0, 1), the outermost 2.733 and the innermost 0.1284, mean squared error 0.009497."""
    levels = gaussian_levels(16)
    assert levels.tolist() == pytest.approx((-levels.flip(0)).tolist(), abs=1e-6)
    assert float(levels[-1]) == pytest.approx(2.733, abs=1e-3)
    assert float(levels[8]) == pytest.approx(0.1284, abs=1e-4)
    rows = torch.randn(4000, 1, 128)
    error = relative_error(LloydMax().fit(make_sample().k)(rows), rows) ** 2
    assert error == pytest.approx(0.0095, rel=0.05)


def test_error_feedback_lowers_the_cost_it_is_given() -> None:
    sample = make_sample(num_tokens=200).k
    cost = {}
    for name, quantizer in (("plain", Coded("int4")), ("aware", HessianAware()), ("served", FedBack())):
        error = quantizer.fit(sample)(sample.rows) - sample.rows
        cost[name] = float(torch.einsum("thd,hde,the->", error, sample.hessian, error))
    assert cost["aware"] < 0.7 * cost["plain"]
    assert cost["served"] < 0.75 * cost["plain"], "blocks of four channels and 8-bit integers lose little"


@pytest.mark.parametrize("codec", ["int4", "int3", "int4v2"])
def test_what_is_prepared_reads_what_pages_give_back(codec: str) -> None:
    """The fit, `append`, then `gather`, to the last bit."""
    sample = make_sample(num_tokens=40, offset=20.0)
    fitted_to_it = fit([sample.statistics], CacheFormat(codec).resolve(128))[0]
    out = through_pages(sample, codec, **fitted_to_it.constants())
    for read, part, want in zip(
        fitted("prepared" if codec == "int4" else f"prepared_{codec}", sample), (sample.k, sample.v), out, strict=True
    ):
        assert torch.equal(read(part.rows), want)


def test_outliers_are_kept_exactly() -> None:
    rows = torch.randn(20, 2, 128)
    rows[:, :, 17] = 300.0
    sample = make_sample().k
    read = Outliers(Coded("int4"), 1).fit(sample)(rows)
    assert torch.equal(read[..., 17], rows[..., 17])
    assert relative_error(read, rows) < 0.1 * relative_error(Coded("int4").fit(sample)(rows), rows)


def test_low_rank_is_exact_on_rows_of_low_rank() -> None:
    basis = torch.linalg.qr(torch.randn(128, 20)).Q
    rows = torch.randn(300, 2, 20) @ basis.T + 3.0
    quantizer = LowRank(Coded("fp32"), 20 / 128)
    assert relative_error(quantizer.fit(Sample(rows, torch.eye(128).expand(2, -1, -1)))(rows), rows) < 1e-4
    full = torch.randn(300, 2, 128)
    assert relative_error(quantizer.fit(Sample(full, torch.eye(128).expand(2, -1, -1)))(full), full) > 0.5


def test_kmeans_finds_clusters() -> None:
    centers = torch.randn(200, 2)
    rows = centers[torch.randint(0, 200, (300, 1, 64))].flatten(-2)
    sample = Sample(rows, torch.eye(128)[None])
    assert relative_error(KMeans().fit(sample)(rows), rows) < 0.1
    gaussian = torch.randn(300, 1, 128)
    assert 0.05 < relative_error(KMeans().fit(Sample(gaussian, sample.hessian))(gaussian), gaussian) < 0.12


def test_names() -> None:
    assert all(find_method(name).name == name for name in NAMES)
    with pytest.raises(FormatError, match=r"--formats: .* methods that `sawkv formats` lists; got 'int5'"):
        find_method("int5")
    with pytest.raises(FormatError, match="divisor of head_dim 64"):
        find_method("int4-k128-v128").fit(make_sample(head_dim=64))
