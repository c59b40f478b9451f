"""`sawkv bench` with servers and a load generator that are stand-ins; the generator's protocol and its child process
are the real ones.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from sawkv import SawkvError, cli
from sawkv.bench import run, server, show
from sawkv.bench.generator import Generator, options
from sawkv.bench.prediction import predict
from sawkv.bench.records import Bench, Load, Result, Served, Setting
from sawkv.errors import UnsupportedError
from sawkv.integrations.vllm import client
from sawkv.integrations.vllm.server import running
from tests.lab.test_report import check

MODEL = "models/sawkv-6m"
FAKE = """
import json, pathlib, sys
for line in sys.stdin:
    words, done = json.loads(line)
    value = dict(zip(words[:-1], words[1:]))
    if value["--request-rate"] == "7": sys.exit("the server said no")
    if value["--request-rate"] == "8": import time; time.sleep(60)
    asked = int(value["--num-prompts"])
    speed = float(value["--port"])
    found = {"completed": asked - (value["--request-rate"] == "9"),
             "duration": asked / speed, "request_throughput": speed,
             "output_throughput": speed * int(value["--random-output-len"]), "request_goodput": speed / 2}
    for name in ("ttft", "tpot"):
        found |= {f"p50_{name}_ms": 100 / speed, f"p99_{name}_ms": 200 / speed}
    pathlib.Path(value["--result-dir"], value["--result-filename"]).write_text(json.dumps(found))
    pathlib.Path(done).touch()
"""
SMALL = ["bench", MODEL, "--input", "96", "--requests", "4"]
TWO_CACHES = ["--formats", "16-bit,int4", "--prefix", "0"]
SETTING = Setting(MODEL, 96, 32, 64, 4)


class Client(client.Client):
    """A server that says little. Its port is its speed, for the stand-in of the generator."""

    asked = 0

    def get(self, path: str, *, timeout: float = 10) -> str:
        Client.asked += 100
        counts = {"queries": Client.asked, "hits": Client.asked / 4}
        return "".join(f"vllm:prefix_cache_{name}_total{{x}} {count}\n" for name, count in counts.items())

    def notice(self) -> str:
        return "sawkv: KV cache format int4" if self.port == 8 else ""

    def kv_cache_dtypes(self) -> dict[str, int]:
        return {"int4_per_token_head" if self.port == 8 else "auto": 5}

    def kv_tokens(self) -> int:
        return 1000 * self.port


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Servers that were started, by cache; fp8 is not to be had."""
    found: list[str] = []

    @contextlib.contextmanager
    def serving(command: Sequence[str], log: Path, **_: Any) -> Iterator[Client]:
        cache = (
            command[command.index("--format") + 1] if "--format" in command else "fp8" if "fp8" in command else "16-bit"
        )
        found.append(cache)
        if cache == "fp8":
            raise UnsupportedError("vLLM ended with status 1: no fp8 on this device")
        yield Client(8 if cache == "int4" else 4, log)

    monkeypatch.setattr(server, "serving", serving)
    monkeypatch.setattr(run, "Generator", lambda: Generator(("-c", FAKE)))
    monkeypatch.setattr(run, "find_device", lambda: ("a cpu", False))
    monkeypatch.setattr(run, "_has_vllm", lambda: True)
    return found


def test_caches_are_measured_one_after_the_other(
    started: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "bench.json"
    assert cli.main([*SMALL, "--output", "32", "--prefix", "64", "--out", str(out)]) == 1, "fp8 was not served"
    assert started == ["16-bit", "fp8", "int4"]
    bench = Bench.from_json(out.read_text())
    assert [load.name for load in bench.loads] == [
        "all at once",
        "shared prefix",
        "2/s",
        "3/s",
        "4/s",
    ], "shares of 4 requests/s"
    wide, fp8, narrow = bench.served
    assert (wide.problem, narrow.problem) == ("", "")
    assert "no fp8 on this device" in fp8.problem
    assert [result.load for result in wide.results] == [result.load for result in narrow.results] == list(bench.loads)
    assert {result.prefix_hits for result in wide.results} == {0.25}
    assert wide.results[0] == Result(Load(math.inf), 1.0, 4.0, 128.0, 2.0, 25.0, 50.0, 25.0, 50.0, 0.25)
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    assert "[3/3 int4]" in shown
    assert "load 5/5, 4/s: 256 tok/s" in shown
    assert any(line.startswith("16-bit ") and "4,000" in line for line in lines)
    assert sum("2.00x" in line for line in lines) == 6, "tokens held, and each load"
    assert "fp8 was not measured: vLLM ended with status 1: no fp8" in shown
    rows = list(csv.DictReader(io.StringIO(out.with_suffix(".csv").read_text())))
    assert len(rows) == 10
    assert float(rows[1]["output tok/s"]) == 256.0
    page = out.with_suffix(".html").read_text()
    text = " ".join(check(page).text)
    assert "vllm bench serve --backend openai" in text
    assert "no fp8 on this device" in text
    assert "sawkv bench models/sawkv-6m" in text
    assert "sawkv: KV cache format int4" in text
    assert "5 int4_per_token_head" in text
    assert "Nothing of the shared prefix" not in shown + text
    lost = replace(narrow, results=tuple(replace(result, prefix_hits=0.0) for result in narrow.results))
    missed = replace(bench, served=(wide, fp8, lost))
    for whole in (" ".join(show.text(missed).split()), show.page(missed)):
        assert "Nothing of the shared prefix was found in int4: the prefix cache finds whole blocks alone" in whole


@pytest.mark.parametrize(
    ("cache", "layers", "options", "words"),
    [
        ("16-bit", {"auto": 5}, (), None),
        ("16-bit", {"fp8": 5}, (), "expected kv_cache_dtype auto in all attention layers, got fp8 in 5"),
        ("fp8", {"fp8": 5}, (), None),
        ("fp8", {"auto": 1, "fp8": 4}, (), "got auto in 1, fp8 in 4"),
        ("int4-k0-v0", {"auto": 1, "int4_per_token_head": 4}, (), "got auto in 1"),
        ("int4", {"auto": 1, "int4_per_token_head": 4}, ("--kv-cache-dtype-skip-layers", "0"), None),
        ("int4", {"auto": 5}, ("--kv-cache-dtype-skip-layers", "0"), "expected kv_cache_dtype int4_per_token_head"),
        ("bf16-k0-v0", {"auto": 5}, (), None),
    ],
)
def test_a_cache_is_what_its_name_says(
    cache: str, layers: dict[str, int], options: tuple[str, ...], words: str | None
) -> None:
    """A checkpoint may ask for FP8 in silence, and vLLM's TurboQuant keeps layers in 16 bits."""
    with pytest.raises(UnsupportedError, match=words) if words else contextlib.nullcontext():
        server.check_layers(cache, layers, options)


def test_a_stopped_run_goes_on(
    started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    command = [*SMALL, *TWO_CACHES, "--rates", "1,2", "--out", str(out)]
    real, asked = Generator.generate, []

    def generate(self: Generator, words: Sequence[str], port: int, patience: float) -> dict[str, Any]:
        asked.append((port, words[words.index("--request-rate") + 1]))
        if len(asked) == 5:
            raise KeyboardInterrupt
        return real(self, words, port, patience)

    monkeypatch.setattr(Generator, "generate", generate)
    assert cli.main(command) == 130
    kept = Bench.from_json(out.read_text())
    assert [len(served.results) for served in kept.served] == [3, 1]
    asked[:] = [(0, "")] * 5
    started.clear()
    assert cli.main([*command, "--resume"]) == 0
    assert started == ["int4"]
    assert asked[5:] == [(8, "1"), (8, "2")]
    assert [len(served.results) for served in Bench.from_json(out.read_text()).served] == [3, 3]
    capsys.readouterr()
    assert cli.main([*command, "--resume", "--output", "9"]) == 2
    assert "expected a record with the same setting" in capsys.readouterr().err
    whole = out.read_text()
    assert cli.main([*command, "--resume", "--formats", "int4"]) == 2
    assert "--formats: expected 16-bit too, whose measurements are in the record" in capsys.readouterr().err
    assert out.read_text() == whole
    assert cli.main([*command, "--resume", "--formats", "int4,16-bit,fp8"]) == 1, "fp8 is not to be had"
    assert [len(served.results) for served in Bench.from_json(out.read_text()).served] == [3, 3, 0]


def test_what_was_measured_before_a_failure_is_kept(started: list[str], tmp_path: Path) -> None:
    out = tmp_path / "b.json"
    command = [*SMALL, *TWO_CACHES, "--rates", "2,7", "--out", str(out)]
    assert cli.main(command) == 1
    for served in Bench.from_json(out.read_text()).served:
        assert [result.load.rate for result in served.results] == [math.inf, 2]
        assert "the server said no" in served.problem
    started.clear()
    assert cli.main([*command, "--resume"]) == 1
    assert started == ["16-bit", "int4"], "asked again for what is missing"


def test_outputs_are_asked_for_first(started: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.html").mkdir()
    assert cli.main(["bench", MODEL, "--out", str(tmp_path / "x.json")]) == 2
    assert "x.html: it is a folder" in capsys.readouterr().err
    assert cli.main(["bench", MODEL, "--out", str(tmp_path / "x.csv")]) == 2
    newest = ["bench", MODEL, "--formats", "16-bit,int4-r32", "--kv-cache-dtype-skip-layers", "0"]
    assert cli.main([*newest, "--out", str(tmp_path / "y")]) == 2
    assert "(-r32): --kv-cache-dtype-skip-layers (take the format" in capsys.readouterr().err
    assert cli.main(["bench", MODEL, "--formats", "int5", "--out", str(tmp_path / "y")]) == 2
    assert cli.main(["bench", MODEL, "--prefix", "512", "--out", str(tmp_path / "y")]) == 2
    assert "--prefix: expected fewer tokens than --input, 512, got 512" in capsys.readouterr().err
    assert cli.main(["bench", MODEL, "--input", "999999", "--out", str(tmp_path / "y")]) == 2
    assert "--input and --output: expected at most " in capsys.readouterr().err
    for rate in ("0", "-1", "nan", "inf"):
        assert cli.main(["bench", MODEL, "--rates", f"1,{rate}", "--out", str(tmp_path / "y")]) == 2
        assert f"--rates: expected finite numbers above 0, got {float(rate)}" in capsys.readouterr().err
    for name in (".", "/"):
        assert cli.main(["bench", MODEL, "--out", name]) == 2
        assert "--out: expected a name for the JSON record" in capsys.readouterr().err
    assert started == []


def test_vllm_without_sawkv_is_no_result(started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "notice", lambda self: "")
    out = tmp_path / "b.json"
    assert cli.main(["bench", MODEL, "--formats", "int4", "--rates", "1", "--out", str(out)]) == 1
    (served,) = Bench.from_json(out.read_text()).served
    assert served.results == ()
    assert "vLLM runs with a cache of its own" in served.problem


def test_a_generator_that_fails_is_started_again() -> None:
    with Generator(("-c", FAKE)) as generator:
        with pytest.raises(UnsupportedError, match="exit status 1:\nthe server said no"):
            generator.generate(options(SETTING, Load(7), 0), 4, 30)
        with pytest.raises(UnsupportedError, match="expected answers to 4 requests, got 3"):
            generator.generate(options(SETTING, Load(9), 0), 4, 30)
        with pytest.raises(UnsupportedError, match="expected an end within 1 s"):
            generator.generate(options(SETTING, Load(8), 0), 4, 1)
        assert generator.generate(options(SETTING, Load(2), 0), 4, 30)["completed"] == 4
        assert generator._child is not None
        pid = generator._child.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("impatient", [False, True])
def test_the_children_of_a_child_end_too(impatient: bool, tmp_path: Path) -> None:
    """As vLLM's engine does where its server was killed; and where Ctrl-C is typed again while the server ends."""
    script = f"""
import signal, subprocess, sys, time
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
if {impatient}: exec(deaf.partition("time.")[0])
child = subprocess.Popen([sys.executable, "-c", deaf])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    command = [sys.executable, "-c", script]
    with (
        pytest.raises(KeyboardInterrupt) if impatient else contextlib.nullcontext(),
        running(command, 5, stdout=subprocess.DEVNULL) as server,
    ):
        deadline = time.monotonic() + 20
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        pid = int((tmp_path / "pid").read_text())
        os.kill(pid, 0)
        if impatient:
            real = server.wait
            server.wait = lambda patience=None: real() if patience is None else signal.raise_signal(signal.SIGINT)
    state = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + 10
    while state.exists() and state.read_text().split()[2] not in "ZX" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not state.exists() or state.read_text().split()[2] in "ZX"


def test_each_load_has_prompts_of_its_own_and_of_one_length() -> None:
    shared, rate = options(SETTING, Load(math.inf, 64), 2), options(SETTING, Load(2.5), 3)
    found = [dict(itertools.pairwise(words)) for words in (shared, rate)]
    assert [value["--request-rate"] for value in found] == ["inf", "2.5"]
    assert [(value["--random-prefix-len"], value["--random-input-len"]) for value in found] == [
        ("64", "32"),
        ("0", "96"),
    ]
    assert found[0]["--seed"] != found[1]["--seed"]
    assert shared[shared.index("--goodput") + 1 :][:2] == ["ttft:1000", "tpot:100"]


def test_the_prediction_is_that_of_vllms_blocks() -> None:
    """Measured: vLLM 0.32 on a CPU prints these for models/sawkv-6m with 256 MiB."""
    words = ["--kv-cache-memory-bytes", str(256 << 20)]
    assert predict(MODEL, "16-bit", words, 4096, on_gpu=False) == pytest.approx(52352, rel=0.01)
    assert predict(MODEL, "int4", words, 4096, on_gpu=False) == pytest.approx(197376, rel=0.01)
    assert predict(MODEL, "int4", words, 160, on_gpu=False) == 123360, "a request takes whole blocks"
    assert predict(MODEL, "int4", [], 4096, on_gpu=False) is None


def test_odd_records_are_shown() -> None:
    bench = Bench(SETTING, "a cpu", {"sawkv": "0"}, ("16-bit", "<b>"), (Load(math.inf),))
    check(show.page(bench))
    assert "KV tokens" not in show.text(bench), "a table of nothing"
    result = Result(Load(math.inf), 1, 0, 0, 0, 0, 1e6, 0, 1e6, 0)
    bench = replace(
        bench, served=(Served("16-bit", kv_tokens=9, predicted_tokens=0, results=(result,)), Served("<b>", "no"))
    )
    check(show.page(bench))
    for name in ("m", "a/folder/whose/name/is-long-" * 3):
        shown = show.text(replace(bench, setting=replace(SETTING, model=name)))
        assert all(len(line) <= 80 for line in shown.splitlines())
        assert " on a cpu, vLLM" in shown, "nothing is cut off"
    with pytest.raises(SawkvError, match="expected a record of `sawkv bench`"):
        Bench.from_json("{}")
