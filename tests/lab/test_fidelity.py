"""The fidelity harness, without a server: what the worker keeps and compares, and what is made of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import fidelity, fidelity_tables
from sawkv.integrations.vllm.client import Client, _cause
from sawkv.lab.divergence import TokenScores
from sawkv.lab.methods import Method
from sawkv.lab.samples import LayerSample
from sawkv.prepare.states import Reader

WINDOW, SIZE, VOCABULARY = 12, 8, 50


class Model(torch.nn.Module):
    """States to logits, in bf16 as vLLM computes them."""

    def __init__(self, head: torch.Tensor) -> None:
        super().__init__()
        self.head = torch.nn.Parameter(head)

    def compute_logits(self, states: torch.Tensor) -> torch.Tensor:
        return states @ self.head


def recorder(model: Model) -> Any:
    from benchmarks.recorder import Recorder

    found = Recorder()
    found.model_runner = SimpleNamespace(model=model)
    found.record_states()
    return found


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, as vLLM is imported
@pytest.mark.parametrize("rows", [WINDOW - 1, WINDOW])
def test_distributions_are_compared_over_the_whole_vocabulary(rows: int, tmp_path: Path) -> None:
    """As vLLM's two runners call it: with all prompt tokens or all but the last, in pieces, and once for the sampled
    token.
    """
    head = torch.randn(SIZE, VOCABULARY).bfloat16()
    states = torch.randn(2, 3, rows, SIZE).bfloat16()
    ids = torch.randint(0, VOCABULARY, (3, WINDOW))
    save_file({"ids": ids}, tmp_path / "ids")
    wide, narrow = (recorder(Model(head)) for _ in range(2))
    for kept, windows in zip((wide, narrow), states, strict=True):
        for window in windows:
            for piece in (window[:7], window[7:], window[-1:]):
                kept.model_runner.model.compute_logits(piece)
    wide.save_states(str(tmp_path / "wide"), str(WINDOW))
    narrow.compare_states(str(tmp_path / "wide"), str(WINDOW), str(tmp_path / "ids"), str(tmp_path / "out"))
    found = load_file(tmp_path / "out")
    p, q = ((part[:, : WINDOW - 1] @ head).double().log_softmax(-1) for part in states)
    torch.testing.assert_close(found["kl"].double(), (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-5)
    for name, want in (("loss", q), ("loss_16bit", p)):
        torch.testing.assert_close(
            found[name].double(), -want.gather(-1, ids[:, 1:, None])[..., 0], rtol=1e-4, atol=1e-5
        )
    assert torch.equal(found["same_top1"], p.argmax(-1) == q.argmax(-1))


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_states_of_other_requests_are_noticed(tmp_path: Path) -> None:
    kept = recorder(Model(torch.randn(SIZE, VOCABULARY)))
    kept.model_runner.model.compute_logits(torch.randn(WINDOW + 5, SIZE))
    with pytest.raises(RuntimeError, match="got 17 rows"):
        kept.save_states(str(tmp_path / "out"), str(WINDOW))


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    held = 0
    for seed in range(200):
        low, high = fidelity.interval(torch.randn(32, generator=torch.Generator().manual_seed(seed)).double() + 1)
        held += bool(low <= 1 <= high)
    assert 175 <= held <= 198


def test_records_say_what_the_scores_say(tmp_path: Path) -> None:
    kl, loss = torch.rand(5, 20), torch.rand(5, 20) + 1
    scores = TokenScores(kl, loss, kl < 0.5)
    found = fidelity.summary(scores, loss - 0.1)
    assert found["mean_kl"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found["kl_ci95"][0] < found["mean_kl"] < found["kl_ci95"][1]
    assert found["ppl"] / found["ppl_16bit"] == pytest.approx(2.718281828**0.1, rel=1e-3)
    assert found["ppl_ratio_ci95"] == pytest.approx([2.718281828**0.1] * 2, rel=1e-3)
    record: dict[str, Any] = {"model": "m", "text": "prose", "method": "served", "through": "server", "window": 21}
    fidelity.write(tmp_path / "out", [record | found, record | {"text": "python"}])
    fidelity.write(tmp_path / "out", [record | {"mean_kl": 7}])
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [(line["text"], line.get("mean_kl")) for line in lines] == [("python", None), ("prose", 7)]


def test_the_log_says_the_cause_the_size_and_whether_sawkv_runs(tmp_path: Path) -> None:
    log = tmp_path / "log"
    notice = "sawkv: KV cache format int4-k64-v64, 72 bytes per token, KV head and layer (16 bits: 256)"
    log.write_text(f"(Worker) INFO {notice}\nINFO CPU KV cache size: 20,468 tokens\n")
    client = Client(1, log)
    assert client.kv_tokens() == 20468
    assert client.notice() == notice
    assert fidelity._bits(client, "served", tmp_path) == 4.5
    assert _cause("ValueError: too big\nRuntimeError: Engine failed. See root cause above.\n") == "too big"
    assert _cause("killed\n") == "killed"
    pydantic = (
        "pydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, too long [type=value_error]"
    )
    assert _cause(f"{pydantic}\n    For further information visit a page") == "Value error, too long"


def made_record(method: str, through: str, scale: float, **changes: Any) -> dict[str, Any]:
    by_window = [scale * value for value in (1.0, 1.2, 0.8, 1.1)]
    return {
        "device": "a GPU", "commit": "abc", "model": "m", "method": method, "through": through, "bits": 4.25,
        "text": "prose", "window": 64, "tokens": 252, "mean_kl": 1.025 * scale, "kl_p999": 1.0,
        "kl_ci95": [0.9 * scale, 1.1 * scale], "same_top1": 0.9, "ppl": 10.1, "ppl_16bit": 10.0,
        "ppl_ratio_ci95": [1.0, 1.02], "kl_by_window": by_window,
    } | changes  # fmt: skip


def test_what_was_wanted_passes_and_fails() -> None:
    served, lab = made_record("served", "server", 0.02), made_record("prepared", "lab", 0.019)
    peer, fp8 = made_record("vllm_int4_per_token_head", "server", 0.06), made_record("fp8", "server", 0.012)
    assert [passed for passed, _ in fidelity_tables.checks([served, lab, peer, fp8])] == [True] * 4
    assert "KL 0.33 (0.33 to 0.33) of vllm_int4_per_token_head" in next(
        what for _, what in fidelity_tables.checks([served, peer])
    )
    worse = made_record("served", "server", 0.03, ppl=10.4)
    assert [passed for passed, _ in fidelity_tables.checks([worse, lab, peer, fp8])] == [False] * 4
    qwen = [record | {"model": "Qwen2.5-0.5B"} for record in (served, fp8)]
    assert [passed for passed, _ in fidelity_tables.checks(qwen)] == [False, True]
    assert (
        "| **`sawkv serve`** | 4.25 | 0.0205 (0.0180 to 0.0220) | 1 | 90.0% | 10.10 (+1.0%) |"
        in fidelity_tables.tables([served], [])
    )


def test_rivals_stand_beside_formats_of_sawkv() -> None:
    place = {"window": 512, "tokens": 2044}
    records = [
        made_record("prepared", "lab", 9.0, window=512, tokens=511),
        made_record("oscar_codes", "lab", 1.0, bits=2.5, **place),
        made_record("kvarn_codes", "lab", 0.2, bits=3.5625, **place),
        made_record("prepared_int3", "lab", 0.1, bits=3.5, **place),
        made_record("prepared_int3", "server", 5.0, **place),
    ]
    rows = [row for row in fidelity_tables.tables(records, []).splitlines() if row.startswith("| ")]
    assert rows[:4] == [
        "| codes alone | bits | m |",
        "| KVarN, K4V2 | 3.5625 | 0.2050 (0.1800 to 0.2200) |",
        "| **sawkv `int3`** | 3.5 | 0.1025 (0.0900 to 0.1100) |",
        "| OSCAR | 2.5 | 1.02 (0.9000 to 1.10) |",
    ]
    drawing = fidelity_tables.curves(records)
    assert all(drawing.count(f">{name}</text>") == 1 for name in ("OSCAR", "KVarN, K4V2", "int3"))
    whole = made_record("oscar", "lab", 1.0, bits=4.6, bits_of_codes=2.5, window=2048)
    assert "| OSCAR | 2.5, 4.6 | 1.02 (0.9000 to 1.10), +1.0% |" in fidelity_tables.tables([whole], [])
    one = whole | {"kl_by_window": [1.0]}
    assert "| OSCAR | 2.5, 4.6 | 1.02, +1.0% |" in fidelity_tables.tables([one], []), "one window has no interval"
    assert "kl.svg" not in fidelity_tables.tables([whole], []), "no picture without points"


def test_lost_answers_are_counted_at_every_depth() -> None:
    def row(method: str, correct: dict[str, int]) -> dict[str, Any]:
        what = {"device": "d", "commit": "c", "model": "m", "task": "needle", "length": 4096}
        return {**what, "method": method, "correct": correct, "asked": 20}

    recall = [row("16bit", {"0.0": 20, "0.5": 3}), row("served", {"0.0": 18, "0.5": 2})]
    assert [passed for passed, _ in fidelity_tables.recall_checks(recall)] == [False, True]
    assert "| m | needle | 4,096 | 23 of 40 | 20 of 40 |" in fidelity_tables.recall_table(recall)


def test_kl_by_position_may_not_decay_beyond_that_of_fp8() -> None:
    kl = torch.cat([torch.full((2, 1024), 0.1), torch.full((2, 1024), 0.3), torch.full((2, 2047), 0.5)], 1)
    found = fidelity.by_position(kl)
    assert [(part["start"], part["end"]) for part in found] == [(0, 1024), (1024, 2048), (2048, 4096)]
    assert [part["mean_kl"] for part in found] == pytest.approx([0.1, 0.3, 0.5])
    assert [part["end"] for part in fidelity.by_position(kl[:, :4000])] == [1024, 2048, 4001]
    served = made_record("served", "server", 1.0, window=4096, kl_by_position=found)
    fp8 = made_record("fp8", "server", 1.0, window=4096, kl_by_position=[part | {"mean_kl": 0.22} for part in found])
    assert [passed for passed, _ in fidelity_tables.position_checks([served, fp8])] == [False, False]
    fp8["kl_by_position"] = [part | {"mean_kl": value} for part, value in zip(found, (0.1, 0.21, 0.3), strict=True)]
    assert [passed for passed, _ in fidelity_tables.position_checks([served, fp8])] == [True, False]
    assert "| mean KL at positions | 0 to 1,024 | 1,024 to 2,048 | 2,048 to 4,096 |" in fidelity_tables.tables(
        [served], []
    )


def test_the_lab_keeps_each_method_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "records.jsonl"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    arguments = f"fidelity models/sawkv-6m --through lab --texts {text} --tokens 31 --window 32 --device cpu"
    arguments += f" --work {tmp_path} --out {out} --commit c --methods int8 int4"
    monkeypatch.setattr(sys, "argv", arguments.split())
    monkeypatch.setattr(fidelity, "shipped_samples", lambda model, text: [])

    def halve_v(method: Method, samples: list[LayerSample]) -> list[tuple[Reader, Reader]]:
        if method.name == "int4":
            raise KeyboardInterrupt
        return [(lambda rows: rows, lambda rows: rows / 2)] * 5

    monkeypatch.setattr(fidelity, "fit", halve_v)
    with pytest.raises(KeyboardInterrupt):
        fidelity.main()
    (record,) = fidelity_tables.read(out)
    assert (record["method"], record["tokens"]) == ("int8", 31)
    assert record["mean_kl"] > 0


def test_servers_that_threads_wait_for_end_with_the_benchmark(tmp_path: Path) -> None:
    pids, end = tmp_path / "pids", time.monotonic() + 60
    server = f"import os, time; print(os.getpid(), file=open({str(pids)!r}, 'a'), flush=True); time.sleep(60)"
    script = f"""
import sys
from benchmarks import fidelity
fidelity._job = lambda name, folder, args: fidelity.Job(name, folder, None, {{}}, None, [], args.work, [])
fidelity._command = lambda *_: [sys.executable, "-c", {server!r}]
fidelity.main()
"""
    words = ["m", "--tokens", "0", "--jobs", "2", "--commit", "c", "--work", str(tmp_path)]
    with subprocess.Popen([sys.executable, "-c", script, *words], stderr=subprocess.DEVNULL) as benchmark:
        while not (pids.exists() and pids.read_text().count("\n") == 2) and time.monotonic() < end:
            time.sleep(0.1)
        benchmark.terminate()
        assert benchmark.wait(20) == 143
    for pid in map(int, pids.read_text().split()):  # two: those that wait for a thread are never started
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
