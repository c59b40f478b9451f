"""Statistics and errors of K and V against plain loops over tokens and heads, and the rules of the recommendation."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest
import torch

from sawkv import SawkvError, cli
from sawkv.lab import analysis, analyze
from sawkv.lab.analysis import Analysis, MethodError, Recommendation
from sawkv.lab.analyze import recommend
from sawkv.lab.description import describe
from sawkv.lab.evaluate import collect_samples
from sawkv.lab.methods import Method, find_method
from sawkv.lab.samples import Sample
from sawkv.prepare.model import EvalModel
from sawkv.prepare.states import LayerStates
from tests.conftest import MODEL
from tests.test_prepare_command import make_model, windows


class Scaled:
    """A quantizer that reads every row times a factor: its errors are known."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def bits(self, head_dim: int) -> float:
        return 4.0

    def fit(self, sample: Sample) -> object:
        return lambda rows: rows * self.factor


def make_states(num_tokens: int = 40, num_q_heads: int = 4, num_kv_heads: int = 2, head_dim: int = 16) -> LayerStates:
    q = torch.randn(num_tokens, num_q_heads, head_dim)
    k, v = torch.randn(2, num_tokens, num_kv_heads, head_dim)
    return LayerStates(3 * q, k, v, None, 0.3)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One query over the keys that it sees: weights and output, fp64."""
    weights = ((k.double() @ q.double()) * scale).softmax(0)
    return weights, weights @ v.double()


def check_outputs(
    states: LayerStates, sliding_window: int | None, softcap: float | None, sinks: list[float] | None
) -> None:
    """Of scores with a cap, or beside a sink, whose weight no value gets."""
    attention = analyze._Attention(states, sliding_window, softcap, None if sinks is None else torch.tensor(sinks))
    for head in range(4):
        for row, position in enumerate(attention.position.tolist()):
            seen = slice(max(0, position + 1 - sliding_window) if sliding_window else 0, position + 1)
            scores = states.k[seen, head // 2].double() @ states.q[position, head].double() * states.softmax_scale
            if softcap:
                scores = softcap * (scores / softcap).tanh()
            if sinks:
                scores = torch.cat([scores, torch.tensor(sinks[head : head + 1], dtype=torch.float64)])
            want = scores.softmax(0)[: scores.numel() - bool(sinks)] @ states.v[seen, head // 2].double()
            got = attention._by_query(attention.output)[head // 2, head % 2, row]
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sliding_window", "softcap", "sinks"),
    [(None, None, None), (7, None, None), (None, 2.0, None), (7, None, [1.0, -2, 3, 0])],
)
def test_errors_of_scores_and_output_equal_those_of_plain_loops(
    sliding_window: int | None, softcap: float | None, sinks: list[float] | None
) -> None:
    states = make_states()
    if softcap or sinks:
        check_outputs(states, sliding_window, softcap, sinks)
        return
    noisy_k, noisy_v = states.k + 0.1 * torch.randn_like(states.k), states.v + 0.1 * torch.randn_like(states.v)
    attention = analyze._Attention(states, sliding_window)
    spread, lost, variance = attention.errors(noisy_k, noisy_v)
    wanted = torch.zeros(3, 2, dtype=torch.float64)
    for head in range(4):
        kv, outputs = head // 2, []
        for position in attention.position.tolist():
            seen = slice(max(0, position + 1 - sliding_window) if sliding_window else 0, position + 1)
            q = states.q[position, head]
            weights, output = attend(q, states.k[seen, kv], states.v[seen, kv], states.softmax_scale)
            _, moved = attend(q, noisy_k[seen, kv], noisy_v[seen, kv], states.softmax_scale)
            delta = (noisy_k[seen, kv] - states.k[seen, kv]).double() @ q.double() * states.softmax_scale
            wanted[0, kv] += (weights * (delta - weights @ delta) ** 2).sum()
            wanted[1, kv] += (moved - output).square().sum()
            outputs.append(output)
        wanted[2, kv] += (torch.stack(outputs) - torch.stack(outputs).mean(0)).square().sum()
    for got, want in zip((spread, lost, variance), wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


def test_an_offset_of_keys_is_no_error_of_scores_and_one_of_values_is() -> None:
    """The softmax does not see what all keys share."""
    states = make_states()
    attention = analyze._Attention(states, None)
    spread, lost, variance = attention.errors(states.k + 5 * torch.randn(1, 2, 16), states.v)
    assert float((lost / variance).max()) < 1e-6
    assert float(spread.max()) < 1e-4
    _, lost, variance = attention.errors(states.k, states.v + 5.0)
    assert float((lost / variance).min()) > 1


def test_statistics_show_an_offset_an_outlier_and_a_sink() -> None:
    states = make_states(num_tokens=200)
    states.k.mul_(0.01)
    states.k[:, 0, 3] += 4.0  # an offset, and the one large channel
    states.q[..., :] = 0
    states.q[:, :2, 3] = 1.0
    states.k[0, 0, 3] = 400.0  # all queries of KV head 0 look at the first token
    stats = analyze._StatsSum()
    stats.add(states, analyze._Attention(states, None))
    found = stats.result()
    assert found.k.offset[0] < found.k.offset[0] + found.k.offset[1] < 1
    assert found.k.outlier[0] > 100
    assert found.k.outlier[1] < 2
    assert found.sink[:2] == (1.0, 1.0)
    assert max(found.sink[2:]) < 0.05
    assert found.sink_norm[0] == pytest.approx(100, rel=0.05)
    assert found.sink_norm[1] < 5
    torch.testing.assert_close(torch.tensor(found.k.mean), states.k.mean(0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(torch.tensor(found.v.rms), states.v.square().mean(0).sqrt(), rtol=1e-3, atol=1e-5)


def run(methods: list[Method] | None = None) -> Analysis:
    model = EvalModel(make_model(8.0, 1.0))
    return analyze.analyze(
        model, windows(2), collect_samples(model, windows(2)), methods, name="a model", text="random"
    )


def test_a_whole_analysis() -> None:
    exact, halved = find_method("fp32"), Method("halved", Scaled(1.0), Scaled(0.5))
    plain, centered = find_method("int4-k0-v0"), find_method("int4_center_plain")
    found = run([exact, halved, plain, centered])
    by_name = {error.method: error for error in found.methods}
    assert by_name["fp32"].mean_output == 0
    assert by_name["halved"].mean_output > 0.25, "half of the output is lost, and half of its mean with it"
    assert analysis.mean(by_name["halved"].k) == 0
    assert by_name["int4_center_plain"].mean_output < 0.5 * by_name["int4-k0-v0"].mean_output, (
        "a key bias is what a center removes"
    )
    assert all(len(grid) == 2 and len(grid[0]) == 2 for grid in msgspec.structs.astuple(by_name["fp32"])[3:])
    assert Analysis.from_json(found.to_json()) == found
    shown = describe(found)
    assert "a model: 2 layers, 4 query heads, 2 KV heads of 32" in shown
    assert "Recommended" in shown
    assert max(map(len, shown.splitlines())) <= 80
    with pytest.raises(SawkvError, match="expected a record of `sawkv analyze`"):
        Analysis.from_json('{"model": 1}')


def test_the_selection_runs_on_any_head_dim_and_has_nothing_to_advise_where_preparation_will_do() -> None:
    found = run()
    by_name = {error.method: error for error in found.methods}
    assert set(by_name) == {"prepared", "int4", "int4_plain", "int8", "fp8", "vllm_int4_per_token_head"}
    assert by_name["prepared"].mean_output < by_name["int4"].mean_output / 2, "keys with a bias"
    assert (found.recommendation.method, found.recommendation.command) == ("prepared", "sawkv serve MODEL")


def method_error(name: str, *output: float, bits: float = 4.25) -> MethodError:
    grid = tuple((value,) for value in output)
    return MethodError(name, bits, "sawkv", grid, grid, grid, grid)


@pytest.mark.parametrize(
    ("errors", "wanted", "command"),
    [
        ([method_error("prepared", 0.01, 0.09)], "prepared", "sawkv serve MODEL"),
        ([method_error("prepared", 0.03, 0.04), method_error("fp8", 0.01, bits=8)], "prepared", "sawkv serve MODEL"),
        ([method_error("prepared", 0.01, 0.3)], "int8", "sawkv serve MODEL --format int8"),
        ([method_error("int4_plain", 0.001), method_error("prepared", 0.005)], "prepared", "sawkv serve MODEL"),
        ([method_error("fp8", 0.1, bits=8)], "", "sawkv serve MODEL"),
    ],
)
def test_the_recommendation(errors: list[MethodError], wanted: str, command: str) -> None:
    """It names what is served, and never what `sawkv serve` would not do by itself or with one option."""
    found = recommend(errors)
    assert (found.method, found.command) == (wanted, command)
    assert found.reason


def test_the_command_keeps_the_windows_before_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "analysis.json"
    command = ["analyze", str(MODEL), "--formats", "int4,fp32", "--window", "64", "--stress", "4", "--device", "cpu"]
    read: list[int] = []

    def stop(errors: list[MethodError]) -> Recommendation:
        read.append(1)
        if len(read) == 3:
            raise KeyboardInterrupt
        return recommend(errors)

    monkeypatch.setattr(analyze, "shipped_samples", lambda model, text: collect_samples(model, text.windows(64, 1)))
    with monkeypatch.context() as patch:
        patch.setattr(analyze, "recommend", stop)
        assert cli.main([*command, "--tokens", "256", "--out", str(out)]) == 130
    assert capsys.readouterr().err == f"sawkv: interrupted; {out} holds what was measured\n"
    stopped = Analysis.from_json(out.read_text())
    assert cli.main([*command, "--tokens", "128", "--out", str(out)]) == 0
    assert "stress 4: 5 layers" in capsys.readouterr().out
    found = Analysis.from_json(out.read_text())
    assert stopped.windows == found.windows == 2
    assert (stopped.layers, stopped.methods) == (found.layers, found.methods)
    assert [error.method for error in found.methods] == ["int4", "fp32"]
    assert all(math.isfinite(value) for error in found.methods for row in error.output for value in row)
