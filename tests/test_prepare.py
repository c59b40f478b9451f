"""Preparation: sums over text, what is fitted to them, and the text that ships."""

from __future__ import annotations

import re

import pytest
import torch

from sawkv.errors import UnsupportedError
from sawkv.format.feedback import fit_feedback
from sawkv.format.rotation import hadamard_matrix
from sawkv.format.spec import CacheFormat
from sawkv.prepare.corpus import preparation_positions, preparation_text, preparation_windows, random_windows
from sawkv.prepare.fit import fit
from sawkv.prepare.statistics import LayerStatistics

HEADS, GROUP, HEAD_DIM = 2, 3, 32


def windows_of(seed: int, dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Q, K and V of three windows of other lengths, with offsets and uneven channels."""
    draw = torch.Generator().manual_seed(seed)

    def rows(count: int, heads: int) -> torch.Tensor:
        wide = torch.exp(torch.randn(heads, HEAD_DIM, generator=torch.Generator().manual_seed(seed + 1)))
        return ((torch.randn(count, heads, HEAD_DIM, generator=draw) + 2) * wide).to(dtype)

    return [(rows(n, HEADS * GROUP), rows(n, HEADS), rows(n, HEADS)) for n in (40, 70, 90)]


def measured(windows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], weight: torch.Tensor | None = None) -> LayerStatistics:
    statistics = LayerStatistics(HEADS, HEAD_DIM, "cpu")
    for window in windows:
        statistics.add(*window)
    if weight is not None:
        statistics.set_output_weight(weight)
    return statistics


def test_statistics_are_those_of_all_rows() -> None:
    windows = windows_of(0, torch.bfloat16)
    q, k, v = (torch.cat(parts).double() for parts in zip(*windows, strict=True))
    weight = torch.randn(11, HEADS * GROUP * HEAD_DIM)
    got = measured(windows, weight)
    assert (got.rows, got.windows, got.queries) == (200, 3, 200 * GROUP)
    for kind, x in enumerate((k, v)):
        torch.testing.assert_close(got.sums[kind], x.sum(0))
        torch.testing.assert_close(got.squares[kind], x.square().sum(0))
    for head in range(HEADS):
        mine = q[:, head * GROUP : (head + 1) * GROUP].reshape(-1, HEAD_DIM)
        torch.testing.assert_close(got.query_gram[head], mine.T @ mine)
        columns = weight.double().view(11, HEADS, GROUP, HEAD_DIM)[:, head].reshape(-1, HEAD_DIM)
        assert got.output_gram is not None
        torch.testing.assert_close(got.output_gram[head], columns.T @ columns)


@pytest.mark.parametrize("change", ["heads", "queries", "weight"])
def test_statistics_refuse_other_shapes(change: str) -> None:
    q, k, v = windows_of(0)[0]
    statistics = LayerStatistics(HEADS, HEAD_DIM, "cpu")
    refused = {
        "heads": lambda: statistics.add(q, k[:, :1], v[:, :1]),
        "queries": lambda: statistics.add(q[:, :-1], k, v),
        "weight": lambda: statistics.set_output_weight(torch.randn(4, HEAD_DIM)),
    }
    with pytest.raises(UnsupportedError, match="expected"):
        refused[change]()


def test_fit_centers_scales_and_feeds_back() -> None:
    layers = [windows_of(seed) for seed in (0, 1)]
    weight = torch.randn(11, HEADS * GROUP * HEAD_DIM)
    fitted = fit([measured(layers[0], weight), measured(layers[1])], CacheFormat.parse("int4"))
    hadamard = hadamard_matrix(HEAD_DIM)
    for windows, layer, known in zip(layers, fitted, (True, False), strict=True):
        q, k, v = (torch.cat(parts).double() for parts in zip(*windows, strict=True))
        for x, center in ((k, layer.k_center), (v, layer.v_center)):
            assert center is not None
            torch.testing.assert_close(center, x.mean(0).float())
        queries = q.view(len(q), HEADS, GROUP, HEAD_DIM).transpose(0, 1).flatten(1, 2)
        columns = weight.double().view(11, HEADS, GROUP, HEAD_DIM).permute(1, 2, 0, 3).flatten(1, 2)
        value = columns.mT @ columns if known else torch.eye(HEAD_DIM, dtype=torch.float64).expand(HEADS, -1, -1)
        parts = ((k, queries.mT @ queries / queries.shape[1], layer.k_gain, layer.k_feedback), (v, value, layer.v_gain, layer.v_feedback))
        for x, hessian, gain, got in parts:
            exact = (hessian.diagonal(dim1=-2, dim2=-1) / x.var(0, correction=0)) ** 0.25
            assert gain is not None
            torch.testing.assert_close(gain, (exact / exact.log().mean(-1, keepdim=True).exp()).float(), rtol=1e-4, atol=0)
            stored = hessian / gain[:, :, None].double() / gain[:, None, :].double()
            wanted = fit_feedback(hadamard @ stored @ hadamard)
            assert got is not None
            assert got.weights.any()
            assert (got.weights.int() - wanted.weights.int()).abs().max() <= 1  # fp32 rotation against fp64
            torch.testing.assert_close(got.step, wanted.step, rtol=1e-4, atol=1e-12)


def test_fit_gives_the_same_bytes_twice_and_whatever_else_is_fitted() -> None:
    one, two = measured(windows_of(0)), measured(windows_of(1))
    together, alone = fit([one, two], CacheFormat.parse("int4"))[1], fit([two], CacheFormat.parse("int4"))[0]
    assert together.k_feedback is not None
    assert alone.k_feedback is not None
    assert together.k_feedback.weights.equal(alone.k_feedback.weights)
    for name in ("k_center", "v_center", "k_gain", "v_gain"):
        a, b = getattr(together, name), getattr(alone, name)
        assert a.equal(b)


def test_fit_of_int8_feeds_nothing_back() -> None:
    layer = fit([measured(windows_of(0))], CacheFormat.parse("int8"))[0]
    assert layer.k_center is not None
    assert layer.k_feedback is None


@pytest.mark.parametrize(("spoil", "got"), [(None, "none"), (torch.nan, "NaN or infinity"), (torch.inf, "NaN or infinity")])
def test_fit_says_which_layer_cannot_be_fitted(spoil: float | None, got: str) -> None:
    bad = LayerStatistics(HEADS, HEAD_DIM, "cpu")
    if spoil is not None:
        q, k, v = windows_of(0)[0]
        k[3, 1, 5] = spoil
        bad.add(q, k, v)
    with pytest.raises(UnsupportedError, match=rf"attention layer 1, got {got}"):
        fit([measured(windows_of(0)), bad], CacheFormat.parse("int4"))


def test_the_text_has_many_scripts() -> None:
    text = preparation_text()
    for script in (
        "[a-z]",
        "[\u0430-\u044f]",
        "[\u03b1-\u03c9]",
        "[一-龯]",
        "[ぁ-ん]",
        "[가-힣]",
        "[ء-ي]",
        "[א-ת]",
        "[अ-ह]",
        "[ก-ฮ]",
        r'"\w+": ',
        r"\bdef \w+\(",
    ):
        assert re.search(script, text), script
    assert "\n====" not in text


@pytest.mark.parametrize(("window", "count", "prefix"), [(64, 8, ()), (96, 4, (7, 9)), (4096, 16, (1,))])
def test_windows_are_text_behind_a_prefix(window: int, count: int, prefix: tuple[int, ...]) -> None:
    text = preparation_text()
    windows = preparation_windows(lambda t: [ord(c) for c in t], window, count, prefix)
    assert windows.shape == (count, window)
    assert windows.dtype == torch.int64
    seen = text + text[:window]
    for row in windows.tolist():
        assert tuple(row[: len(prefix)]) == prefix
        assert "".join(map(chr, row[len(prefix) :])) in seen
    if window * count < len(text):  # spread: the last one ends with the text
        assert "".join(map(chr, windows[-1, len(prefix) :].tolist())) == text[-window + len(prefix) :]


def test_random_windows_are_always_the_same() -> None:
    windows = random_windows(1000, 32, 4)
    assert windows.shape == (4, 32)
    assert windows.equal(random_windows(1000, 32, 4))
    assert 0 <= windows.min() < windows.max() < 1000


def test_positions_are_spread_over_the_context() -> None:
    assert preparation_positions(3, 512, 32768) == [0, 16128, 32256]
    assert preparation_positions(3, 512, 512) == [0, 0, 0]
    assert preparation_positions(2, 512, 100) == [0, 0]
    assert preparation_positions(1, 512, 4096) == [0]
