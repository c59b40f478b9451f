"""sawkv's own names of `--kv-cache-dtype`, and with them the vLLM that has no CPU build yet (`tools/next_vllm.py`)."""

from __future__ import annotations

from typing import Any

import pytest

from sawkv.integrations.vllm.config import OWN_DTYPE_CODECS, dtype_for
from sawkv.integrations.vllm.contract import TAKES_NAMES, installed_release
from tests.vllm.engine import run_engine

# Of torch.jit, as vLLM is imported.
pytestmark = [pytest.mark.vllm, pytest.mark.next, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

TAKEN = installed_release() >= TAKES_NAMES
PROMPTS = [[list(range(400, 440 + 60 * i)) for i in range(4)], [list(range(400, 700))]]  # the second hits the prefix
NEEDS_NAMES = pytest.mark.skipif(not TAKEN, reason="this vLLM takes no names from plugins")


def engine(**options: Any) -> dict[str, Any]:
    result = run_engine(waves=PROMPTS, dtype="float32", block_size=32, max_num_batched_tokens=128, **options)
    assert "error" not in result, result["error"]
    assert result["metrics"]["prefix_cache_hits"] > 0
    return result


def test_vllm_takes_them_from_0_33_on_and_once() -> None:
    from vllm.config import CacheConfig

    from sawkv.integrations.vllm import dtypes

    dtypes.install()
    dtypes.install()
    for name, codec in OWN_DTYPE_CODECS.items():
        assert (dtype_for(codec) == name) == TAKEN
        if TAKEN:
            assert CacheConfig(cache_dtype=name).cache_dtype == name
        else:
            with pytest.raises(ValueError, match="cache_dtype"):
                CacheConfig(cache_dtype=name)


@NEEDS_NAMES
def test_without_the_plugin_vllm_stops() -> None:
    assert "sawkv_int4" in run_engine(mutate="keep_out", kv_cache_dtype="sawkv_int4")["error"]


@NEEDS_NAMES
def test_pages_under_our_name_equal_the_simulated_format_and_those_under_vllms_name_bit_for_bit() -> None:
    """`test_controls.py` has the control of this comparison."""
    packed = engine(kv_cache_dtype="sawkv_int4")
    assert packed["implementation"] == ["SawAttentionImpl"]
    assert packed["log"][0].startswith("sawkv: KV cache format int4-k128-v128, 136 bytes per token")
    simulated = engine(mutate="simulate_int4", additional_config={"sawkv": {"format": "fp32-k128-v128"}})
    by_vllms_name = engine(kv_cache_dtype="int4_per_token_head")
    for other in (simulated, by_vllms_name):
        assert (other["tokens"], other["logprobs"]) == (packed["tokens"], packed["logprobs"])
    assert by_vllms_name["kv_tokens"] == packed["kv_tokens"]
