"""Preparation: sums over text, what is fitted to them, and the text that ships."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from sawkv.errors import UnsupportedError
from sawkv.format.constants import BUCKET_SIZE
from sawkv.format.feedback import cost_with_feedback, fit_feedback
from sawkv.format.rotation import hadamard_matrix, rotate
from sawkv.format.spec import CacheFormat
from sawkv.prepare import linear, text
from sawkv.prepare.calibration import Calibration
from sawkv.prepare.corpus import preparation_positions, preparation_text, preparation_windows, random_windows
from sawkv.prepare.fit import fit
from sawkv.prepare.statistics import QUERY_STEP, LayerStatistics
from sawkv.prepare.turning import Turning
from tests.conftest import relative_error

HEADS, GROUP, HEAD_DIM, SCALE = 2, 3, 32, 0.02
INT4 = CacheFormat("int4").resolve(HEAD_DIM)


def windows_of(seed: int, dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Q, K and V of three windows of other lengths, with offsets and uneven channels."""
    draw = torch.Generator().manual_seed(seed)

    def rows(count: int, heads: int) -> torch.Tensor:
        wide = torch.exp(0.5 * torch.randn(heads, HEAD_DIM, generator=torch.Generator().manual_seed(seed + 1)))
        return ((torch.randn(count, heads, HEAD_DIM, generator=draw) + 2) * wide).to(dtype)

    return [(rows(n, HEADS * GROUP), rows(n, HEADS), rows(n, HEADS)) for n in (20, 30, 40)]


def measured(
    windows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], weight: torch.Tensor | None = None, sliding: int = 0
) -> LayerStatistics:
    statistics = LayerStatistics(HEADS, HEAD_DIM, "cpu", SCALE, sliding)
    if weight is not None:
        statistics.set_output_weight(weight)
    for window in windows:
        statistics.add(*window)
    return statistics


def counted(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weight: torch.Tensor | None, window: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """What rows of K and of V count, [num_tokens, heads] each: query by query, the output's move by a score from the
    definition.
    """
    found = torch.zeros(2, len(k), HEADS, dtype=torch.float64)
    for head in range(HEADS * GROUP):
        mine = head // GROUP
        columns = (
            torch.eye(HEAD_DIM).double()
            if weight is None
            else weight.double().view(11, HEADS, GROUP, HEAD_DIM)[:, mine].flatten(0, 1)
        )
        for i in range(len(q) - 1, -1, -QUERY_STEP):
            seen = slice(max(0, i + 1 - window) if window else 0, i + 1)
            a = (k[seen, mine].double() @ q[i, head].double() * SCALE).softmax(0)
            values = v[seen, mine].double()
            moved = (values - a @ values) @ columns.T
            found[0, seen, mine] += a**2 * moved.square().sum(-1)
            found[1, seen, mine] += a**2
    return found[0], found[1]


@pytest.mark.parametrize(("known", "sliding"), [(True, 0), (False, 0), (True, 7)])
def test_statistics_count_rows_by_what_their_errors_cost(known: bool, sliding: int) -> None:
    windows = windows_of(0, torch.bfloat16)
    weight = torch.randn(11, HEADS * GROUP * HEAD_DIM) if known else None
    got = measured(windows, weight, sliding)
    assert (got.rows, got.queries) == ([90], 90 * GROUP)
    weights, sums, squares = (
        torch.zeros(shape, dtype=torch.float64) for shape in ((2, HEADS), (2, HEADS, HEAD_DIM), (2, HEADS, HEAD_DIM))
    )
    for q, k, v in windows:
        for kind, (x, count) in enumerate(zip((k, v), counted(q, k, v, weight, sliding), strict=True)):
            weights[kind] += count.sum(0)
            sums[kind] += torch.einsum("th,thd->hd", count, x.double())
            squares[kind] += torch.einsum("th,thd->hd", count, x.double().square())
    for mine, wanted in ((got.weights[0], weights), (got.sums[0], sums), (got.squares, squares)):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)
    q = torch.cat([q for q, _, _ in windows]).double().view(-1, HEADS, GROUP, HEAD_DIM).transpose(0, 1).flatten(1, 2)
    torch.testing.assert_close(got.query_gram, q.mT @ q)
    if weight is None:
        assert got.output_gram is None
    else:
        columns = weight.double().view(11, HEADS, GROUP, HEAD_DIM).permute(1, 2, 0, 3).flatten(1, 2)
        torch.testing.assert_close(got.output_gram, columns.mT @ columns)


@pytest.mark.parametrize("change", ["heads", "queries", "weight", "order"])
def test_statistics_refuse_other_shapes(change: str) -> None:
    q, k, v = windows_of(0)[0]
    statistics = LayerStatistics(HEADS, HEAD_DIM, "cpu")
    refused = {
        "heads": lambda: statistics.add(q, k[:, :1], v[:, :1]),
        "queries": lambda: statistics.add(q[:, :-1], k, v),
        "weight": lambda: statistics.set_output_weight(torch.randn(4, HEAD_DIM)),
        "order": lambda: measured(windows_of(0)).set_output_weight(torch.randn(4, HEADS * HEAD_DIM)),
    }
    with pytest.raises(UnsupportedError, match="expected"):
        refused[change]()


def test_fit_centers_scales_and_feeds_back() -> None:
    weight = torch.randn(11, HEADS * GROUP * HEAD_DIM)
    layers = [measured(windows_of(0), weight), measured(windows_of(1))]
    fitted = fit(layers, INT4)
    hadamard = hadamard_matrix(HEAD_DIM)
    for statistics, layer in zip(layers, fitted, strict=True):
        weights = statistics.weights[0, ..., None]
        means = statistics.sums[0] / weights
        spreads = statistics.squares / weights - means.square()
        value = (
            torch.eye(HEAD_DIM).double().expand(HEADS, -1, -1)
            if statistics.output_gram is None
            else statistics.output_gram
        )
        parts = (
            (statistics.query_gram / statistics.queries, layer.k_center, layer.k_gain, layer.k_feedback),
            (value, layer.v_center, layer.v_gain, layer.v_feedback),
        )
        for (hessian, center, gain, got), mean, spread in zip(parts, means, spreads, strict=True):
            assert center is not None
            assert gain is not None
            torch.testing.assert_close(center.view(HEADS, HEAD_DIM), mean.float())
            torch.testing.assert_close(gain.log().mean(-1), torch.zeros(HEADS), rtol=0, atol=1e-5)

            def cost(
                gain: torch.Tensor, hessian: torch.Tensor = hessian, spread: torch.Tensor = spread
            ) -> torch.Tensor:
                exact = gain.double()
                rotated = hadamard @ (hessian / exact[:, :, None] / exact[:, None, :]) @ hadamard
                return cost_with_feedback(rotated)[0].log() + (spread * exact.square()).sum(-1).log()

            least = cost(gain)
            assert (least <= cost((hessian.diagonal(dim1=-2, dim2=-1) / spread) ** 0.25) + 1e-5).all()
            others = torch.stack([cost(gain * torch.exp(0.2 * torch.randn_like(gain))) for _ in range(20)])
            assert (least < others.mean(0)).all()
            stored = hessian / gain[:, :, None].double() / gain[:, None, :].double()
            wanted = fit_feedback(hadamard @ stored @ hadamard)
            assert got is not None
            assert got.weights.any()
            assert got.weights.equal(wanted.weights)
            torch.testing.assert_close(got.step, wanted.step, rtol=1e-4, atol=1e-12)


def test_heads_that_are_stored_as_two_rows_are_fitted_row_by_row() -> None:
    statistics = LayerStatistics(1, 512, "cpu", SCALE)
    statistics.set_output_weight(torch.randn(11, 2 * 512))
    statistics.add(*(torch.randn(30, heads, 512) * (0.1 + torch.rand(512)) + torch.randn(512) for heads in (2, 1, 1)))
    got = fit([statistics], CacheFormat("int4"))[0]
    assert got.k_center is not None
    assert got.k_feedback is not None
    assert got.k_feedback.weights.shape == (2, 256, 256)
    for i, channels in enumerate((slice(256), slice(256, 512))):
        part = LayerStatistics(1, 256, "cpu", SCALE)
        part.rows, part.queries, part.weights = statistics.rows, statistics.queries, statistics.weights
        for name in ("sums", "squares", "plain_sums", "plain_squares", "turned_sums"):
            setattr(part, name, getattr(statistics, name)[..., channels])
        for name in ("query_gram", "output_gram"):
            setattr(part, name, getattr(statistics, name)[:, channels, channels])
        want = fit([part], CacheFormat("int4"))[0]
        for name in ("k_center", "v_center", "k_gain", "v_gain"):
            assert getattr(got, name)[..., channels].equal(getattr(want, name))
        for name in ("k_feedback", "v_feedback"):
            assert getattr(got, name).weights[i : i + 1].equal(getattr(want, name).weights)
        for name in ("k_energy", "v_energy"):
            assert getattr(got, name)[i : i + 1].equal(getattr(want, name))


def test_energies_are_those_of_the_rows_as_they_are_stored() -> None:
    windows = windows_of(0)
    layer = fit([measured(windows)], INT4)[0]
    for rows, center, gain, energy in (
        (torch.cat([k for _, k, _ in windows]), layer.k_center, layer.k_gain, layer.k_energy),
        (torch.cat([v for _, _, v in windows]), layer.v_center, layer.v_gain, layer.v_energy),
    ):
        stored = rotate((rows - center) * gain, INT4.k_rotation_order or 0)
        assert energy is not None
        torch.testing.assert_close(energy, stored.square().sum(-1).mean(0), rtol=1e-4, atol=0)


def test_centers_of_buckets_are_those_of_rows_as_they_are_stored() -> None:
    """Energies are of rows about the centers of their buckets. Rows may stand behind the last one."""
    statistics = LayerStatistics(HEADS, HEAD_DIM, "cpu", SCALE, context=3 * BUCKET_SIZE)
    angles = 1e4 ** (-torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM) / 100
    turning = Turning(torch.arange(HEAD_DIM).view(-1, 2), angles)
    offset, text, rows, buckets = 5 * torch.randn(HEADS, HEAD_DIM), torch.randn(60, HEADS, HEAD_DIM), [], []
    for start, is_probe in ((0, True), (1, True), (8, True), (30, False), (2 * BUCKET_SIZE - 40, False), (9999, False)):
        places = start + torch.arange(60)
        k = turning.turn(offset + (text if is_probe else torch.randn(60, HEADS, HEAD_DIM)), places).float()
        v = torch.randn(60, HEADS, HEAD_DIM)
        statistics.add(torch.randn(60, HEADS * GROUP, HEAD_DIM), k, v, places, is_probe)
        if not is_probe:
            rows.append(k)
            buckets.append((places // BUCKET_SIZE).clamp_max(2))
    layer = fit([statistics], INT4)[0]
    assert layer.k_center is not None
    assert layer.k_center.shape == (3, HEADS, HEAD_DIM)
    assert relative_error(layer.k_center[2], layer.k_center[0]) > 0.5
    stored = rotate((torch.cat(rows) - layer.k_center[torch.cat(buckets)]) * layer.k_gain, INT4.k_rotation_order or 0)
    assert layer.k_energy is not None
    torch.testing.assert_close(layer.k_energy, stored.square().sum(-1).mean(0), rtol=1e-4, atol=0)


def test_fit_gives_the_same_bytes_twice_and_whatever_else_is_fitted() -> None:
    one, two = measured(windows_of(0)), measured(windows_of(1))
    together, alone = fit([one, two], INT4)[1], fit([two], INT4)[0]
    assert together.k_feedback is not None
    assert alone.k_feedback is not None
    assert together.k_feedback.weights.equal(alone.k_feedback.weights)
    for name in ("k_center", "v_center", "k_gain", "v_gain", "k_energy", "v_energy"):
        a, b = getattr(together, name), getattr(alone, name)
        assert a.equal(b)


def test_what_is_dead_can_be_fitted_and_kept_in_a_file() -> None:
    """A head of zeros, a channel that never changes, one that no query sees; and one token is enough of a text."""
    q, k, v = windows_of(0)[0]
    k[:, 1], v[:, 1], q[:, GROUP:] = 0, 0, 0
    k[..., 3], q[..., 7] = 5, 0
    layers = fit(
        [measured([(q, k, v)], torch.zeros(8, HEADS * GROUP * HEAD_DIM)), measured([tuple(x[:1] for x in (q, k, v))])],
        INT4,
    )
    for layer in layers:
        for name, part in vars(layer).items():
            assert not name.endswith(("center", "gain", "energy")) or bool(part.isfinite().all())
    made = Calibration.from_layers(INT4, "0123456789abcdef", 2, dict(enumerate(layers)))
    assert made.layer(0).k_gain is not None


def test_fit_of_int8_feeds_nothing_back() -> None:
    """So its gains are those of the plain rule."""
    statistics = measured(windows_of(0))
    layer = fit([statistics], CacheFormat.parse("int8"))[0]
    assert layer.k_center is not None
    assert layer.k_feedback is None
    mean, square = (x[0] / statistics.weights[0, 0, :, None] for x in (statistics.sums[0], statistics.squares))
    exact = (statistics.query_gram.diagonal(dim1=-2, dim2=-1) / (square - mean.square())) ** 0.25
    assert layer.k_gain is not None
    torch.testing.assert_close(
        layer.k_gain, (exact / exact.log().mean(-1, keepdim=True).exp()).float(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(
    ("spoil", "got"), [(None, "none"), (torch.nan, "NaN or infinity"), (torch.inf, "NaN or infinity")]
)
def test_fit_says_which_layer_cannot_be_fitted(spoil: float | None, got: str) -> None:
    bad = LayerStatistics(HEADS, HEAD_DIM, "cpu")
    if spoil is not None:
        q, k, v = windows_of(0)[0]
        k[3, 1, 5] = spoil
        bad.add(q, k, v)
    with pytest.raises(UnsupportedError, match=rf"attention layer 1, got {got}"):
        fit([measured(windows_of(0)), bad], INT4)


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


def test_special_tokens_before_a_text_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where BOS is EOS, as in OPT, and where tokens follow a text."""
    one, other = 2, 3

    class Tokenizer:
        eos_token_id = one

        def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
            ids = [100 + ord(c) for c in text]
            return {"input_ids": [one, *ids, other] if add_special_tokens else ids}

    monkeypatch.setattr(text, "load_tokenizer", lambda _: Tokenizer())
    encode, prefix = text.load_encoder(tmp_path)
    assert prefix == (one,)
    assert encode("b") == [198]


def test_random_windows_are_always_the_same() -> None:
    windows = random_windows(1000, 32, 4)
    assert windows.shape == (4, 32)
    assert windows.equal(random_windows(1000, 32, 4))
    assert 0 <= windows.min() < windows.max() < 1000


def test_positions_are_spread_over_the_context_but_for_the_first_tokens() -> None:
    positions = preparation_positions(3, 512, 32768)
    assert positions.shape == (3, 512)
    for row, first in zip(positions.tolist(), (4, 4096 - 508, 32768 - 508), strict=True):
        assert row == [0, 1, 2, 3, *range(first, first + 508)]
    for short in (512, 100):
        assert preparation_positions(3, 512, short).tolist() == [list(range(512))] * 3
    assert preparation_positions(1, 512, 4096).tolist() == [list(range(512))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_layers_multiply_in_fp32_where_a_cpu_has_no_16_bit_products(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = torch.nn.Linear(200, 30).to(dtype).requires_grad_(False)
    x = torch.randn(3, linear.LEAST_ROWS, 200).to(dtype)
    exact = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    seen: list[torch.dtype] = []
    multiply = torch.nn.functional.linear

    class Spy(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is multiply:
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    for products in (False, True):
        monkeypatch.setattr(linear, "_multiplies", lambda dtype, products=products: products)
        with torch.no_grad(), Spy(), linear.LinearInFp32():
            found, of_named = layer(x), torch.nn.functional.linear(x, weight=layer.weight, bias=None)
            few, none = layer(x[0, 1:]), torch.nn.functional.linear(x, layer.weight)
        assert {found.dtype, of_named.dtype, few.dtype, none.dtype} == {dtype}
        assert torch.equal(of_named, none)
        if not products:
            assert torch.equal(found, multiply(x.float(), layer.weight.float(), layer.bias.float()).to(dtype))
        assert relative_error(found, exact) < 0.01
    wide = torch.float32
    assert seen == [wide, wide, dtype, wide, *[dtype] * 4], "few rows, and CPUs with products, are left alone"
