"""What layers of vLLM measure, without an engine: turnings from probes, rows by their positions, and heads of ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sawkv.format.constants import BUCKET_SIZE
from sawkv.prepare.calibration import LayerCalibration
from sawkv.prepare.corpus import passes
from sawkv.prepare.statistics import LayerStatistics
from tests.test_turning import rope

# Of torch.jit, as vLLM is imported.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

HEADS, HEAD_DIM, CONTEXT = 2, 64, 2 * BUCKET_SIZE


def test_layers_measure_how_keys_turn() -> None:
    """A layer, and one that reads its pages, on probes and two windows of keys with a static part."""
    from sawkv.integrations.vllm.measure import LayerMeasurement, Prompt

    impl: Any = SimpleNamespace(prefill=None, scale=HEAD_DIM**-0.5, sliding_window=0, logits_soft_cap=0.0, sinks=None)
    statistics = LayerStatistics(HEADS, HEAD_DIM, "cpu", context=CONTEXT)
    layer = LayerMeasurement(statistics)
    sharing = LayerMeasurement(statistics, layer)
    static, text = 4 * torch.randn(HEADS, HEAD_DIM), torch.randn(64, HEADS, HEAD_DIM)
    windows = torch.arange(64) + torch.tensor([[0], [CONTEXT - 64]])
    for running in passes(torch.zeros(2, 64, dtype=torch.int64), windows, CONTEXT):
        n = len(running.ids)
        key = static + (text[:n] if running.is_probe else torch.randn(n, HEADS, HEAD_DIM))
        key = rope(key, running.positions, HEAD_DIM, 1e6, "halves").float()
        prompt = Prompt(slice(0, n), torch.tensor([0, n], dtype=torch.int32))
        query, value = torch.randn(n, 2 * HEADS, HEAD_DIM), torch.randn(n, HEADS, HEAD_DIM)
        for each, rows in ((layer, (key, value)), (sharing, (key + 99, value + 99))):
            each.positions, each.is_probe = running.positions, running.is_probe
            each.attend(impl, query, *rows, [prompt], torch.empty_like(query))
    assert statistics.rows == [128, 128], "probes are not counted, and both layers' rows are"
    of_k = statistics.centers[:, 0]
    assert float((of_k[0] - of_k[1]).norm()) > 1


def test_ranks_join_their_heads() -> None:
    from sawkv.integrations.vllm.measure import _joined

    first, second = torch.randn(3, 2, HEAD_DIM), torch.randn(3, 1, HEAD_DIM)
    parts = [LayerCalibration(k_center=first, v_center=torch.zeros(2, HEAD_DIM))]
    parts.append(LayerCalibration(k_center=second, v_center=torch.ones(1, HEAD_DIM)))
    joined = _joined(parts)
    assert joined.k_center is not None
    assert joined.v_center is not None
    assert joined.v_center.shape == (3, HEAD_DIM)
    assert torch.equal(joined.k_center, torch.cat([first, second], 1))
    assert joined.k_gain is None
