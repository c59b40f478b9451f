"""The release gate: on a real checkpoint the formats are in order; and it fails where they are not."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from benchmarks import ladder
from sawkv.lab import evaluate
from sawkv.lab.records import Divergence
from tools.fetch_model import NOT_TO_BE_HAD

REFERENCE = Divergence(tokens=100, mean_kl=0.0, kl_se=0.0, kl_p999=0.0, kl_max=0.0, same_top1=1.0, ppl=10.0)
KL = {"bf16": 0.00001, "int8": 0.0002, "prepared": 0.02, "int4": 0.07, "int4_plain": 0.15}


def rungs(**changes: float) -> dict[str, Divergence]:
    ppl = changes.pop("ppl", 10.2)
    return {name: replace(REFERENCE, mean_kl=kl, ppl=ppl) for name, kl in (KL | changes).items()}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, None),
        ({"int4": 0.019}, "FAIL  prepared is nearer to 16 bits than int4"),
        ({"int8": 0.03}, "FAIL  int8 is nearer to 16 bits than prepared"),
        ({"prepared": 0.036}, "FAIL  prepared: mean KL 0.03600, at most 0.035"),
        ({"bf16": float("nan")}, "FAIL  bf16: mean KL nan"),
        ({"ppl": 10.4}, "FAIL  prepared: 1.0400 of the perplexity"),
        ({"int4": 0.03, "int4_plain": 0.05}, "FAIL  int4_plain, the control, is 2.5 times as far"),
    ],
)
def test_every_check_can_fail(
    changes: dict[str, float], wanted: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = ladder.judge(REFERENCE, rungs(**changes), ladder.LIMITS)
    shown = capsys.readouterr().out
    assert bool(failed) == (wanted is not None) == ("FAIL" in shown)
    assert wanted is None or wanted in shown


def test_the_ladder_stands_on_a_real_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Prepared on a quarter of the text, which costs a few percent of the KL, and under the same limits."""
    monkeypatch.setattr(evaluate, "NUM_WINDOWS", 4)
    status = ladder.main(["--device", "cpu"])
    shown = capfd.readouterr()
    if status == NOT_TO_BE_HAD and "cannot be had here" in shown.err:
        pytest.skip(f"no real checkpoint: {shown.err.strip().splitlines()[-1]}")
    assert status == 0, shown.out
