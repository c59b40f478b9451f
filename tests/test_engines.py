"""`benchmarks.engines`: an engine in a process of its own; what is recorded; what `sawkv bench` measured as records of
latency; what `benchmarks.kernels` is asked for.
"""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import engines, kernels, load, serving
from benchmarks.plots import load_table
from sawkv.bench.records import FP8, SIXTEEN_BITS, Bench, Load, Result, Served, Setting

ENGINE = """
import argparse, subprocess, sys, time
parser = argparse.ArgumentParser()
for name in ("engine-of", "model", "end"):
    parser.add_argument(f"--{name}")
args = parser.parse_args()
print("vLLM says much")
print('\\nRECORD {"say": "a line", "format": "%s", "model": "%s"}' % (args.engine_of, args.model), flush=True)
if args.end == "fail":
    sys.exit("the engine is broken")
if args.end == "hang":
    child = subprocess.Popen(["sleep", "300"])
    print(f"child {child.pid}", flush=True)
    time.sleep(300)
print("done")
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "made_up_engine.py").write_text(ENGINE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["benchmark", "--model", "shape"])
    return tmp_path / "log"


def test_records_come_back_and_the_rest_is_the_log(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = list(engines.run_apart("made_up_engine", "int4", ["--model", "folder"], log, patience=60))
    assert found == [{"format": "int4", "model": "folder"}], "of two arguments alike the last counts"
    assert log.read_text().split("\n") == ["vLLM says much", "", "done", ""]
    assert "a line" in capsys.readouterr().out


def test_what_an_engine_said_last_is_shown_when_it_fails(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(list(engines.run_apart("made_up_engine", "int4", ["--end", "fail"], log, patience=60))) == 1
    assert "int4: vLLM ended with 1; the log's end:\n" in (said := capsys.readouterr().out)
    assert said.rstrip().endswith("the engine is broken")


def test_an_engine_that_hangs_is_stopped_with_its_children(log: Path) -> None:
    start = time.monotonic()
    assert len(list(engines.run_apart("made_up_engine", "int4", ["--end", "hang"], log, patience=3))) == 1
    assert time.monotonic() - start < 30
    command = ["ps", "-o", "stat=", "-p", log.read_text().split("child ")[1].split()[0]]
    end = time.monotonic() + 10  # on busy cores a killed process has its last turn later
    while subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()[:1] not in ("", "Z"):
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize(("free", "recorded"), [("137.71", False), ("139.1", True)])
def test_a_load_beside_another_process_is_not_recorded(
    free: str, recorded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_apart(module: str, name: str, words: object, log: Path, patience: float) -> Iterator[dict[str, Any]]:
        log.write_text(f"Free memory on device ({free}/139.8 GiB) on startup. GPU KV cache size: 2,952,064 tokens\n")
        yield {"format": name}

    output = tmp_path / "records"
    monkeypatch.setattr(engines, "run_apart", run_apart)
    monkeypatch.setattr(serving, "serving_table", lambda records: "")
    monkeypatch.setattr(serving, "read_records", lambda file: [])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    words = ["--formats", "int4", "--model", "folder", "--log", str(tmp_path), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["serving", *words])
    serving.main()
    assert output.exists() == recorded
    assert ("int4: not recorded, 2.1 GiB of the card were taken" in capsys.readouterr().out) != recorded


def test_rates_of_a_bench_become_records() -> None:
    def result(rate: float, tokens: float) -> Result:
        return Result(Load(rate), 10.0, rate, tokens, 1.0, 20.0, 40.0, 5.0, 9.0, 0.0)

    setting = Setting("folder/shape", 8192, 512, 0, 60)
    wide = Served(SIXTEEN_BITS, results=(result(math.inf, 900.0), result(2.0, 400.0)))
    served = (wide, Served(FP8, problem="none here"), Served("int4", results=(result(2.0, 600.0),)))
    bench = Bench(setting, "a card", {"vllm": "0.1"}, ("16-bit", "fp8", "int4"), (), served)
    records = list(load.rates(bench, "abc"))
    assert [(r["format"], r["rate"], r["output_tok_s"]) for r in records] == [
        ("bf16", 2.0, 400.0),
        ("int4", 2.0, 600.0),
    ]
    table = load_table(records)
    assert table.startswith("shape in vLLM 0.1, 8192/512 tokens a request on a card\n")
    assert "| 2 | int4 | 600 (1.50x) | 20 (1.00x) | 40 (1.00x) | 5.0 (1.00x) | 9.0 (1.00x) | abc |" in table


def test_shapes_are_chosen_by_whole_names_or_wildcards() -> None:
    lists = kernels.all_shapes(), kernels.turns()
    assert kernels.choose(["*"], *lists) == [*map(list, lists)]
    for patterns, names in (
        (["32x16384", "8x65536 query_len 9"], [["32x16384"], ["8x65536 query_len 9"]]),
        (["*x16384 page *"], [["32x16384 page 16", "32x16384 page 32"], []]),
    ):
        assert [[shape.name for shape in shapes] for shapes in kernels.choose(patterns, *lists)] == names
    with pytest.raises(ValueError, match="got '16384'"):
        kernels.choose(["64x16384", "16384"], *lists)
