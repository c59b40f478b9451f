"""Formats that keep the newest tokens in 16 bits, on a GPU: `pytest -m gpu tests/gpu/test_recent.py`. Needs vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.agreement import first_difference
from sawkv.integrations.vllm.contract import PADS_PAGES, installed_release
from tests.newest_checks import check_newest
from tests.vllm.engine import run_engine
from tests.vllm.test_controls import prompts
from tests.vllm.test_recent import apart_from_the_lab
from tests.vllm.test_recent_on_gpu import DECODES, FEW, HEAD_DIM, HEADS, OTHERS, check_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
newer = pytest.mark.skipif(installed_release() < PADS_PAGES, reason="vLLM pads no pages")

NEAR_TIE = 0.13
"""Nats between the two tokens' log-probabilities, each in its own run: a step of each. Logits in bf16 are 0.06 apart
from 8 on, where half of the largest are."""
LIMITS: dict[str, Any] = {
    "attention_backend": "CUSTOM",
    "dtype": "bfloat16",
    "max_num_batched_tokens": 128,
    "max_num_seqs": 8,
    "num_gpu_blocks_override": 80,  # of 64 tokens
    "gpu_memory_utilization": 0.1,
}
GRAPHS: dict[str, Any] = {
    "enforce_eager": False,
    "compilation_config": {
        "mode": 0,  # Inductor would round elsewhere
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": list(range(1, 9)),  # no batch is padded, so products are those of eager steps
    },
}


def named(name: str) -> dict[str, Any]:
    quantized = {} if name.startswith("bf16") else {"kv_cache_dtype": "int4_per_token_head"}
    return quantized | {"additional_config": {"sawkv": {"format": name}}}


def engine(name: str, **options: Any) -> dict[str, Any]:
    result = run_engine(waves=prompts(), max_tokens=64, **(LIMITS | named(name) | options))
    assert "error" not in result, result["error"]
    assert result["implementation"] == ["SawAttentionImpl"]
    assert result["metrics"]["prefix_cache_hits"] > 0
    return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "has_sinks": True}])
@pytest.mark.parametrize(
    ("window", "head_dim", "group"),
    [
        (32, 128, 4),
        (64, 128, 4),
        (128, 128, 4),
        (16, 64, 8),
        (48, 80, 40),
        (32, 256, 1),
        (496, 256, 16),
        (992, 192, 12),
    ],
)
def test_the_kernel(window: int, head_dim: int, group: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    shape = {"window": window, "head_dim": head_dim, "group": group, "dtype": dtype} | options
    check_newest("cuda", **shape)
    check_newest("cuda", seq_lens=[8, 0, 3000, window, 1, window + 9] * 50, query_lens=[8, 0, 1, 4, 1, 2] * 50, **shape)


@pytest.mark.parametrize("wrong", [{"window": 31}, {"window": 33}])
def test_a_wrong_window_is_noticed(wrong: dict[str, Any]) -> None:
    """The control of `test_the_kernel`."""
    with pytest.raises(AssertionError):
        check_newest("cuda", wrong=wrong)


def test_a_graph_replays_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured for requests without tokens, replayed twice for others."""
    from sawkv.kernels.triton import recent

    attend_newest = recent.attend_newest

    def replay(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> None:
        tensors = {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
        held = {name: torch.zeros_like(x) for name, x in tensors.items()}
        attend_newest(q, k, v, **given | held)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            attend_newest(q, k, v, **given | held)
        found = []
        for _ in range(2):
            for name, x in tensors.items():
                held[name].copy_(x)
            graph.replay()
            found.append(held["out"].clone())
        given["out"].copy_(found[0])
        assert torch.equal(*(x.nan_to_num() for x in found))

    monkeypatch.setattr(recent, "attend_newest", replay)
    check_newest("cuda", seq_lens=[300, 0, 20, 33, 0], query_lens=[1, 0, 1, 1, 0])


@pytest.fixture
def _on_gpu() -> Iterator[None]:
    with torch.device("cuda:0"):
        yield


@newer
@pytest.mark.usefixtures("_on_gpu")
@pytest.mark.parametrize(("window", "softcap", "with_sinks"), [(32, 0.0, False), (64, 0.0, True), (16, 3.0, True)])
@pytest.mark.parametrize(
    "requests", [DECODES, FEW, OTHERS, DECODES + OTHERS], ids=["decodes", "few", "prompts", "both"]
)
@pytest.mark.parametrize("version", [2, 3])
def test_each_query_reads_the_newest_tokens_exactly(
    requests: list[tuple[int, int]],
    window: int,
    softcap: float,
    with_sinks: bool,
    version: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM's FlashAttention and its write over padded blocks, our kernels, and vLLM's merge."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func
    from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported

    if not is_fa_version_supported(version) or (with_sinks and version == 2):
        pytest.skip("not here")
    sinks = torch.randn(HEADS).bfloat16() if with_sinks else None
    assert HEAD_DIM == 64
    check_step(
        requests, window, softcap, sinks, flash_attn_varlen_func, monkeypatch, torch.bfloat16, 3e-2, fa_version=version
    )


@newer
def test_unquantized_equals_pages_alone() -> None:
    """Prompts in chunks, prefix hits and decodes; up to near-ties, since both parts are rounded before they join."""
    alone, kept = engine("bf16-k0-v0"), engine("bf16-k0-v0-r32")
    agreed = 0
    for wave in range(2):
        for i, text in enumerate(alone["tokens"][wave]):
            first = first_difference(text, kept["tokens"][wave][i])
            agreed += len(text) if first is None else first
            if first is not None:
                apart = alone["logprobs"][wave][i][first] - kept["logprobs"][wave][i][first]
                assert abs(apart) <= NEAR_TIE, f"text {i} of wave {wave} differs from token {first} on"
    assert agreed >= 16 * 64 / 2


@newer
@pytest.mark.parametrize("name", ["int4-r32", "int3-r64"])
def test_graphs_replay_what_eager_steps_do(name: str) -> None:
    options = {"block_size": 128, "num_gpu_blocks_override": 60} if name == "int3-r64" else {}
    assert engine(name, **GRAPHS, **options)["tokens"] == engine(name, **options)["tokens"]


@newer
@pytest.mark.parametrize("name", ["int4-r32", "int3-r64"])
def test_the_engine_starts_as_users_start_it(name: str) -> None:
    """With vLLM's compiler, all graphs, its measure of their memory, and the page size that sawkv asks for."""
    options = {k: v for k, v in LIMITS.items() if k != "num_gpu_blocks_override"}
    result = run_engine(
        waves=prompts(), enforce_eager=False, kv_cache_memory_bytes=None, **options, **named(name)
    )  # else vLLM measures nothing
    assert "error" not in result, result["error"]
    assert all(len(text) == 32 for wave in result["tokens"] for text in wave)


@newer
def test_a_prompt_in_chunks_reads_what_the_lab_reads() -> None:
    """In bf16, and the lab in fp32."""
    found = apart_from_the_lab("int4-r64", **LIMITS)
    assert found["int4-r64"] < 0.3 * found["int4"]


@pytest.mark.skipif(installed_release() >= PADS_PAGES, reason="vLLM pads pages")
def test_older_versions_are_refused_by_name() -> None:
    error = run_engine(**LIMITS, **named("int4-r32"))["error"]
    assert "format int4-r32: expected vLLM 0.32 or newer" in error
