"""What happens to a server in its life, under real vLLM: `make soak` in short, and looks inside one engine
(docs/reliability.md).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import torch

from benchmarks.soak import Difference, Load, Reference, Report, Soak
from sawkv import CacheFormat, PageLayout
from tests.conftest import MODEL, REPOSITORY
from tests.vllm.life import MARK

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory) -> Report:
    # fp32: where a CPU has bf16 instructions, products depend on the batch, and two steps of a bf16 logit are more than
    # a near-tie.
    options = ("--enforce-eager", "--dtype", "float32")
    load = Load(str(MODEL), tokens=4000, restarts=1, num_prompts=10, response_tokens=64, num_blocks=64, options=options)
    # Another plugin's name: vLLM would load that alone.
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_PLUGINS": "lora_filesystem_resolver",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        return asyncio.run(Soak(load, tmp_path_factory.mktemp("soak") / "server.log").run())


@pytest.mark.soak
def test_no_response_is_wrong_or_lost(soaked: Report) -> None:
    """1 to 64 clients, dropped requests, preemption, prefix hits and a restart, each of which is asserted to have
    happened.
    """
    assert not soaked.wrong
    assert not soaked.lost
    counts, metrics = soaked.counts, soaked.metrics
    assert counts["tokens checked"] >= 4000
    assert counts["restarts, SIGKILL"] + counts["restarts, SIGTERM"] == 1
    assert counts["requests, drop mid-stream"] > 0
    assert counts["requests, drop early"] > 0
    assert metrics["vllm:num_preemptions_total"] > 0
    assert metrics["vllm:prefix_cache_hits_total"] > 0


@pytest.mark.soak
def test_metrics_of_the_workers_reach_the_servers_endpoint(soaked: Report) -> None:
    metrics = soaked.metrics
    assert metrics["sawkv_tokens_total"] > 1000
    assert metrics["sawkv_rows_total"] == 2 * 5 * 2 * metrics["sawkv_tokens_total"], "K and V, layers, KV heads"
    assert metrics["sawkv_saved_bytes_total"] == metrics["sawkv_rows_total"] * (256 - 68)
    assert metrics["sawkv_non_finite_rows_total"] == metrics["sawkv_saturated_rows_total"] == 0
    assert 0.05 < (metrics["sawkv_squared_error_total"] / metrics["sawkv_squared_norm_total"]) ** 0.5 < 0.2


@pytest.mark.soak
def test_the_dashboard_and_its_page_name_metrics_that_exist(soaked: Report) -> None:
    for document in ("docs/grafana/sawkv.json", "docs/observability.md"):
        named = set(re.findall(r"sawkv_\w+_total", (REPOSITORY / document).read_text()))
        assert named
        assert named <= set(soaked.metrics)
    json.loads((REPOSITORY / "docs/grafana/sawkv.json").read_text())


def test_the_soak_notices_a_wrong_token() -> None:
    """Its own control: a server that answers with one token changed, not as a near-tie."""

    class Liar(Soak):
        async def _alone(self, prompt: Any, max_tokens: int) -> list[int]:
            return list(range(max_tokens))

    soak = Liar(Load(str(MODEL), tokens=1), Path(os.devnull))
    soak.references = [Reference([1, 2], [0, 1, 2])]

    async def top_logprobs(prompt: Any, **options: Any) -> dict[str, float]:
        return {"token_id:1": -0.1, "token_id:9": -0.1 - gap}

    soak._server.top_logprobs = top_logprobs  # type: ignore[method-assign]
    soak._differences = [Difference([1, 2], [0, 1, 2], [0, 9, 0])]
    gap = 0.5
    asyncio.run(soak._explain_differences())
    assert soak.report.wrong == ["2 tokens of prompt, differs from token 1 on"]
    gap = 0.001
    soak.report.wrong.clear()
    asyncio.run(soak._explain_differences())
    assert not soak.report.wrong
    assert soak.report.counts["responses equal up to near-ties"] == 1


@pytest.fixture(scope="module")
def life() -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.vllm.life"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=300)
    results = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert results, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(results[-1])
    return result


def test_a_prefix_hit_leaves_the_bytes_of_a_miss(life: dict[str, Any]) -> None:
    assert life["hits"] == [0, 192, 0, 128, 0, 96], (
        "a miss, a whole hit; another prompt, a part hit; the same with other pieces"
    )
    assert life["whole_hit_equal"]
    assert life["part_hit_equal"]
    assert life["other_prompt_differs"], "the control"
    # Cut in other pieces, a prompt's bytes are the same only if matrix products are.
    assert life["other_pieces_equal"] or not life["matrix_products_do_not_depend_on_the_batch"]


def test_a_nan_in_one_request_harms_no_other_and_is_counted(life: dict[str, Any]) -> None:
    assert life["equal_to_clean_beside_a_nan"] == [False, True, True]
    assert life["equal_to_clean_after_it"], "its pages are used again"
    assert life["non_finite_rows"] > 0


def test_tokens_and_rows_are_counted_exactly(life: dict[str, Any]) -> None:
    assert life["preemptions"] == 0, "or tokens are appended again"
    assert life["tokens_counted"] == life["tokens_appended"] > 1000
    assert life["rows_counted"] == 2 * 5 * 2 * life["tokens_counted"]
    assert life["saved_bytes"] == life["rows_counted"] * (256 - 68)


def test_the_thread_reads_what_no_step_has_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread is not in the inference mode of the steps."""
    from sawkv.integrations.vllm import metrics

    with torch.inference_mode():
        reader = metrics.CounterReader(
            PageLayout(CacheFormat("int4"), 2, 128, 16), [metrics.CountedLayer("a")], torch.device("cpu"), 7
        )
    sample = metrics._metrics()["tokens"].labels("7")._value.get
    reader.flush()  # before the first step
    with torch.inference_mode():
        reader.poll()
        assert reader.counters is not None
        reader.counters[..., 0] += 20
    start = reader._stepped
    reader.flush_if_idle(start + metrics.IDLE / 2)
    assert sample() == 0, "a step began just now"
    for _ in range(2):
        reader.flush_if_idle(start + metrics.IDLE)
        assert sample() == 10, "20 rows of 2 heads in 1 layer, once"
    with torch.inference_mode():
        reader.poll()
        reader.counters[..., 0] += 2
        with reader._lock:  # while the thread reads, a step goes on
            reader.poll()
    reader.flush()
    assert sample() == 11
    monkeypatch.setattr(reader, "flush", lambda: pytest.fail("it is long idle"))
    reader.flush_if_idle(reader._changed + metrics.PATIENCE)


def test_bad_rows_are_a_warning_but_not_a_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    from sawkv.integrations.vllm import metrics

    monkeypatch.setattr(metrics, "INTERVAL", 0.0)
    warnings: list[tuple[Any, ...]] = []
    monkeypatch.setattr(metrics.logger, "warning", lambda *arguments: warnings.append(arguments[1:]))
    reader = metrics.CounterReader(
        PageLayout(CacheFormat("int4"), 2, 128, 16), [metrics.CountedLayer("a")], torch.device("cpu"), None
    )
    reader.poll()
    assert reader.counters is not None
    for non_finite in (0, 3, 5):  # of K; counted up
        reader.counters[0, 0, :2] = torch.tensor([100.0, non_finite])
        reader.poll()
        reader.poll()
    assert warnings == [(3, 0)]


def test_drift_is_the_energy_of_rows_over_that_of_the_text_of_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 for rows like those of preparation, 4 for rows twice as far from the center, and none without enough rows."""
    from sawkv import PagedKVCache, append
    from sawkv.integrations.vllm import metrics
    from sawkv.prepare.fit import fit
    from sawkv.prepare.statistics import LayerStatistics

    monkeypatch.setattr(metrics, "INTERVAL", 0.0)
    layout, slots = PageLayout(CacheFormat("int4").resolve(32), 2, 32, 16), 160_000
    q, k, v = torch.randn(512, 2, 32), torch.randn(512, 2, 32) + 3, torch.randn(512, 2, 32) * torch.linspace(0.1, 4, 32)
    statistics = LayerStatistics(2, 32, "cpu")
    statistics.add(q, k, v)
    (prepared,) = fit([statistics], layout.format)
    assert prepared.k_energy is not None
    assert prepared.v_energy is not None
    energies = float(prepared.k_energy.mean()), float(prepared.v_energy.mean())
    layers = [
        metrics.CountedLayer(f"drift.{name}", known)
        for name, known in (("a", energies), ("b", energies), ("unknown", None))
    ]
    reader = metrics.CounterReader(layout, layers, torch.device("cpu"), None)
    reader.poll()
    assert reader.counters is not None
    wide = 3 + 2 * (k - 3)  # of which the center is about 3
    for place, (keys, values, count) in enumerate([(k, v, slots), (wide, v, slots // 4), (k, v, slots)]):
        cache = PagedKVCache.allocate(layout, slots // 16, counters=reader.counters[place], **prepared.constants())
        chosen = torch.randint(512, (count,))
        append(keys[chosen], values[chosen], cache, torch.arange(count))
    reader.poll()
    reader.poll()

    def drift(layer: str, kind: str) -> float | None:
        return prometheus_client.REGISTRY.get_sample_value("sawkv_drift", {"layer": f"drift.{layer}", "kind": kind})

    assert drift("a", "k") == pytest.approx(1, rel=0.15)
    assert drift("a", "v") == pytest.approx(1, rel=0.15)
    assert drift("b", "k") is None  # 78 rows sampled
    assert drift("unknown", "k") is None
    cache = PagedKVCache.allocate(layout, slots // 16, counters=reader.counters[1], **prepared.constants())
    append(wide[torch.randint(512, (slots,))], v[torch.randint(512, (slots,))], cache, torch.arange(slots))
    reader.poll()
    reader.poll()
    assert drift("b", "k") == pytest.approx(4, rel=0.2)
    assert drift("b", "v") == pytest.approx(1, rel=0.15)
