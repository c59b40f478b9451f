"""Rivals' recipes against slow implementations of their definitions, and tokens that stay in 16 bits."""

from __future__ import annotations

import math

import pytest
import torch

from sawkv import cli
from sawkv.errors import FormatError, SawkvError, UnsupportedError
from sawkv.format.rotation import hadamard_matrix
from sawkv.lab import analyze
from sawkv.lab.evaluate import collect_samples
from sawkv.lab.methods import find_method, fit
from sawkv.lab.methods.channel_keys import Grouped
from sawkv.lab.methods.integer import Coded
from sawkv.lab.methods.kvarn import KVarN
from sawkv.lab.methods.oscar import Oscar, rotation
from sawkv.lab.methods.q4_0 import Q40
from sawkv.lab.samples import LayerSample, Sample, sample_pair
from sawkv.prepare import model as eval_model
from sawkv.prepare.states import Kept, LayerStates
from tests.conftest import relative_error
from tests.lab.test_transformers_eval import logits, small_model


def uneven_rows(num_tokens: int, head_dim: int) -> torch.Tensor:
    """[num_tokens, 1, head_dim], tokens and channels of very different sizes, and channels with offsets."""
    sizes = torch.randn(num_tokens, 1, 1).exp() * torch.randn(head_dim).exp()
    return torch.randn(num_tokens, 1, head_dim) * sizes + 2 * torch.randn(head_dim)


def slow_kvarn(tile: list[list[float]], bits: int, turns: int = 16) -> list[list[float]]:
    """A balanced and rounded tile in Python floats: lines of values, each line with a range of its own."""

    def deviation(values: list[float]) -> float:
        mean = math.fsum(values) / len(values)
        return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))

    def divided(by_column: list[float], by_line: list[float]) -> list[list[float]]:
        return [
            [value / math.exp(by_column[j]) / math.exp(by_line[i]) for j, value in enumerate(line)]
            for i, line in enumerate(tile)
        ]

    def inequality(even: list[list[float]]) -> float:
        columns, lines = [deviation(list(column)) for column in zip(*even, strict=True)], [*map(deviation, even)]
        return max(columns) / min(columns) + max(lines) / min(lines)

    def next_scale(scale: float, values: list[float]) -> float:
        return min(10.0, max(-0.3, scale + math.log(min(1e3, max(1e-3, deviation(values))))))

    by_column, by_line = [0.0] * len(tile[0]), [0.0] * len(tile)
    best = (inequality(tile), by_column, by_line)
    for _ in range(turns):
        columns = zip(*divided(by_column, by_line), strict=True)
        by_column = [next_scale(scale, list(column)) for scale, column in zip(by_column, columns, strict=True)]
        by_line = [next_scale(s, line) for s, line in zip(by_line, divided(by_column, by_line), strict=True)]
        found = inequality(divided(by_column, by_line))
        if found <= best[0]:
            best = (found, by_column, by_line)
    _, by_column, by_line = best
    read = []
    for i, line in enumerate(divided(by_column, by_line)):
        low = min(line)
        step = (max(line) - low) / (2**bits - 1)
        read.append(
            [
                (round((value - low) / step) * step + low) * math.exp(by_column[j]) * math.exp(by_line[i])
                for j, value in enumerate(line)
            ]
        )
    return read


@pytest.mark.parametrize("by_channel", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_kvarn_is_its_definition(bits: int, by_channel: bool) -> None:
    """Two tiles of one head, the second incomplete. Rounding to fp16 moves a few codes that lie between two steps."""
    rows = uneven_rows(128 + 40, 16)
    turn = hadamard_matrix(16).float()
    read = KVarN(bits, by_channel).fit(Sample(rows, torch.eye(16)[None]))(rows)[:, 0]

    def slow(turns: int) -> torch.Tensor:
        tiles = []
        for tile in torch.split(rows[:, 0] @ turn, 128):
            lines = torch.tensor(slow_kvarn((tile.mT if by_channel else tile).tolist(), bits, turns))
            tiles.append(lines.mT if by_channel else lines)
        return torch.cat(tiles) @ turn

    want = slow(16)
    apart = (read - want).norm(dim=-1) / (want - rows[:, 0]).norm(dim=-1)
    assert float(apart.median()) < 0.02
    assert relative_error(read, want) < 0.2 * relative_error(want, rows[:, 0])
    assert relative_error(slow(0), want) > 0.3 * relative_error(want, rows[:, 0]), "turns change what is read"


def test_kvarn_serves_uneven_tokens_and_channels() -> None:
    rows = uneven_rows(256, 64)
    sample = Sample(rows, torch.eye(64)[None])
    error = {
        quantizer: ((quantizer.fit(sample)(rows) - rows).norm(dim=-1) / rows.norm(dim=-1)).mean()
        for quantizer in (KVarN(4, by_channel=True), Grouped(by_channel=True))
    }
    assert error[KVarN(4, by_channel=True)] < 0.5 * error[Grouped(by_channel=True)]


def made_states(head_dim: int = 32) -> LayerStates:
    """Three query heads for each of two KV heads, with queries and values of unequal directions."""
    q, k, v = (torch.randn(80, heads, head_dim) * torch.randn(head_dim).exp() for heads in (6, 2, 2))
    return LayerStates(q, k + 1, v, None, head_dim**-0.5)


def test_oscar_is_its_definition() -> None:
    states = made_states()
    head_dim, method = 32, find_method("oscar_codes")
    assert isinstance(method, Oscar)
    of_heads = [
        torch.stack([torch.outer(q, q) for q in states.q[:, 3 * head : 3 * head + 3].flatten(0, 1)]).mean(0)
        for head in range(2)
    ]
    of_values = []
    for head, covariance in enumerate(of_heads):
        weights = [float(k @ covariance @ k) for k in states.k[:, head]]
        total = sum(weights) / len(weights)
        parts = [w / total * torch.outer(v, v) for w, v in zip(weights, states.v[:, head], strict=True)]
        of_values.append(torch.stack(parts).mean(0))
    readers = method.fit(LayerSample(*sample_pair(states), states.empty_statistics()))
    for read, rows, covariances, quantile in zip(
        readers, (states.k, states.v), (of_heads, of_values), (0.96, 0.92), strict=True
    ):
        turn = rotation(torch.stack(covariances).mean(0).double())
        want = torch.empty_like(rows)
        for token, head in torch.cartesian_prod(torch.arange(len(rows)), torch.arange(2)).tolist():
            y = rows[token, head] @ turn
            limit = sorted(y.abs().tolist())[int(quantile * head_dim)]
            y = y.clamp(-limit, limit)
            low, step = y.min(), (y.max() - y.min()) / 3
            want[token, head] = (((y - low) / step).round() * step + low) @ turn.mT
        apart = (read(rows) - want).norm(dim=-1) / want.norm(dim=-1)
        # The sign of an eigenvector may differ between two computations; that of another covariance's would not do.
        assert float((apart > 0.01).float().mean()) < 0.05
        other = rotation(torch.eye(head_dim, dtype=torch.float64))
        assert not torch.allclose(other, turn, atol=0.1)


def test_oscars_rotation_mixes_eigenvectors_in_the_order_of_reversed_bits() -> None:
    root = torch.randn(16, 16, dtype=torch.float64)
    covariance = root @ root.mT
    turn = rotation(covariance).double()
    torch.testing.assert_close(turn @ turn.mT, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-5)
    # Eigenvalues ascend, so place 0 has the last column of U H, place 8 the one before, 4 the one before that.
    columns = turn.new_empty(16, 16)
    for place, column in enumerate((15, 7, 11, 3, 13, 5, 9, 1, 14, 6, 10, 2, 12, 4, 8, 0)):
        columns[:, column] = turn[:, place]
    eigenvectors = columns @ hadamard_matrix(16)
    inside = eigenvectors.mT @ covariance @ eigenvectors
    torch.testing.assert_close(inside.diagonal(), torch.linalg.eigvalsh(covariance), rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedError, match="got 48"):
        rotation(torch.eye(48))


def test_q4_0_is_its_definition() -> None:
    rows = torch.randn(20, 2, 64)
    rows[3] = 0
    read = Q40().fit(Sample(rows, torch.eye(64).expand(2, -1, -1)))(rows)
    for block, got in zip(rows.view(-1, 32).tolist(), read.view(-1, 32).tolist(), strict=True):
        scale = max(block, key=abs) / -8
        stored = float(torch.tensor(scale).half())
        want = [(min(15, math.floor(value / scale + 8.5)) - 8) * stored if scale else 0.0 for value in block]
        assert got == pytest.approx(want, abs=1e-3)


def test_channel_keys_ignore_offsets_of_channels() -> None:
    rows = torch.randn(150, 2, 64)
    offset = 30 * torch.randn(64)
    read = Grouped(by_channel=True).fit(Sample(rows, torch.eye(64).expand(2, -1, -1)))
    assert relative_error(read(rows + offset) - offset, rows) < 1.2 * relative_error(read(rows), rows) < 0.12
    plain = Coded("int4").fit(Sample(rows, torch.eye(64).expand(2, -1, -1)))
    assert relative_error(plain(rows + offset) - offset, rows) > 1


def test_what_is_kept_and_what_it_costs() -> None:
    mask = Kept(first=2, last=3).mask(9)
    assert mask[8].nonzero().flatten().tolist() == [0, 1, 6, 7, 8]
    assert torch.equal(mask[:5], torch.ones(5, 9, dtype=torch.bool).tril())
    tiles = Kept(first=4, tile=4).mask(11)
    assert tiles[10].nonzero().flatten().tolist() == [0, 1, 2, 3, 8, 9, 10]
    assert tiles[8].nonzero().flatten().tolist() == [0, 1, 2, 3, 8]
    assert find_method("oscar").bits(64, 2048) == 2.5 + 13.5 * 320 / 2048
    codes = find_method("kvarn_codes").bits(64)
    assert codes == (4 + 32 / 128 + 16 / 64 + 2 + 32 / 64 + 16 / 128) / 2
    assert find_method("kvarn").bits(64, 2048) == pytest.approx(codes + (16 - codes) * (128 + 64.5) / 2048)
    with pytest.raises(SawkvError, match="got oscar"):
        analyze.analyze(small_model(), torch.zeros(1, 40).long(), [], [find_method("oscar")], name="", text="")


@pytest.mark.parametrize(("window", "softcap", "sinks"), [(0, None, False), (7, None, False), (0, 20.0, True)])
def test_a_query_reads_kept_tokens_as_they_are(window: int, softcap: float | None, sinks: bool) -> None:
    """Against attention computed query by query, with each key and value as that query reads it."""
    length, kept = 23, Kept(first=3, last=4, tile=5)
    q, k, v = torch.randn(1, 4, length, 16), *torch.randn(2, 1, 2, length, 16)

    def read(rows: torch.Tensor) -> torch.Tensor:
        return (2 * rows).round() / 2

    extra = torch.randn(4) if sinks else None
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    place = torch.arange(length)
    seen = (place <= place[:, None]) & (place > place[:, None] - (window or length))

    def attend(hook: object) -> torch.Tensor:
        setattr(module, eval_model._HOOK, hook)
        return eval_model._attention(
            module, q, k, v, seen[None, None] if window else None, scaling=0.3, softcap=softcap, s_aux=extra
        )[0][0]

    want = torch.empty(length, 4, 16)
    for i in range(length):
        for head in range(4):
            keys, values = [], []
            for j in range(max(0, i - window + 1) if window else 0, i + 1):
                whole = j < 3 or j > i - 4 or j // 5 == i // 5
                pair = (k[0, head // 2, j], v[0, head // 2, j])
                keys.append(pair[0] if whole else read(pair[0]))
                values.append(pair[1] if whole else read(pair[1]))
            scores = torch.stack(keys) @ q[0, head, i] * 0.3
            scores = softcap * (scores / softcap).tanh() if softcap else scores
            if extra is not None:
                scores, values = torch.cat([scores, extra[head, None]]), [*values, torch.zeros(16)]
            want[i, head] = scores.softmax(0) @ torch.stack(values)
    torch.testing.assert_close(attend(eval_model._Reading(read, read, kept)), want, rtol=1e-4, atol=1e-5)
    for other in (None, eval_model._Reading(read, read), eval_model._Reading(read, read, Kept(first=3, last=4))):
        assert not torch.allclose(attend(other), want, atol=1e-3)


def test_kvarn_as_it_is_used_does_not_look_ahead() -> None:
    """A change of token 150 is seen by what follows alone, though the codes of its tile, 128 to 255, change."""
    model, ids = small_model(), torch.randint(0, 512, (1, 260))
    other = ids.clone()
    other[0, 150] = (ids[0, 150] + 1) % 512
    samples = collect_samples(model, ids)
    before = {}
    for name in ("kvarn", "kvarn_codes"):
        with model.reading(fit(find_method(name), samples)):
            before[name] = [logits(model, each)[:, :150] for each in (ids, other)]
    torch.testing.assert_close(*before["kvarn"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(*before["kvarn_codes"], rtol=1e-4, atol=1e-4)


def test_formats_that_keep_the_newest_tokens_are_methods() -> None:
    for name in ("int3-r64", "prepared_int3-r64"):
        method = find_method(name)
        assert (method.name, method.kept, method.served) == (name, Kept(last=64), "sawkv")
        assert method.bits(64, 2048) == 3.5 + 16 * 64 / 2048, "the pages hold them too"
    with pytest.raises(FormatError, match="prepared_int3-r40"):
        find_method("prepared_int3-r40")
    with pytest.raises(FormatError, match=r"a quantized format after prepared_.*got prepared_bf16-r32.*take bf16-r32"):
        find_method("prepared_bf16-r32")


def test_kept_tokens_are_refused_before_a_model_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["analyze", "no/such/model", "--formats", "int4,int4-r32"]) == 2
    assert "expected methods that quantize every token, got int4-r32; sawkv eval" in capsys.readouterr().err
