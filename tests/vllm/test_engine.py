"""The plugin in real vLLM engines: capacity, options, tensor parallelism, and what is refused at start-up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sawkv.errors import UnsupportedError
from tests.conftest import MODEL
from tests.vllm.engine import run_engine

pytestmark = pytest.mark.vllm

INT4 = {"kv_cache_dtype": "int4_per_token_head"}
PROMPT = [[list(range(400, 440))]]
EXTENSION = "sawkv.integrations.vllm.worker.Extension"


def shrunk_model(folder: Path, **changes: Any) -> dict[str, Any]:
    """A model directory without weights: the shipped model's configuration in one layer, changed."""
    config = json.loads((MODEL / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "vocab_size": 512} | changes
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if value is not None})
    )
    return {"model": str(folder), "load_format": "dummy", "skip_tokenizer_init": True, **INT4}


def test_capacity_is_3_7_times_that_of_16_bits() -> None:
    wide, narrow = run_engine(), run_engine(**INT4)
    assert narrow["implementation"] == ["SawAttentionImpl"], "the plugin must be the one in use"
    assert narrow["kv_tokens"] >= 3.7 * wide["kv_tokens"]


@pytest.mark.parametrize("block_size", [16, pytest.param(128, marks=pytest.mark.newest)])
def test_a_compiled_model_agrees_with_an_eager_one_at_any_page_size(block_size: int) -> None:
    """enforce_eager=False is vLLM's default; vLLM's own block size on CUDA is 16, that of the CPU 128; most other tests
    use sawkv's 32.
    """
    options = {"dtype": "float32", "waves": PROMPT, "max_tokens": 48}
    eager = run_engine(**options, **INT4)
    compiled = run_engine(**options, **INT4, block_size=block_size, enforce_eager=block_size == 128)
    assert compiled["implementation"] == ["SawAttentionImpl"]
    assert compiled["tokens"] == eager["tokens"]


def test_tensor_parallel_2_gives_the_same_tokens() -> None:
    options = {"dtype": "float32", "waves": PROMPT, "max_tokens": 48}
    alone = run_engine(**options, **INT4)
    apart = run_engine(**options, **INT4, tensor_parallel_size=2, distributed_executor_backend="mp")
    assert apart["tokens"] == alone["tokens"]


@pytest.mark.newest
def test_int8_and_named_formats_are_served() -> None:
    for options, token_bytes in (
        ({"kv_cache_dtype": "int8_per_token_head"}, 2 * 132),
        (INT4 | {"additional_config": {"sawkv": {"format": "int4v3-k64-v64"}}}, 68 + 52),
    ):
        result = run_engine(waves=PROMPT, **options)
        assert result["implementation"] == ["SawAttentionImpl"]
        assert len(result["tokens"][0][0]) == 32
        assert result["kv_tokens"] == pytest.approx((64 << 20) / (5 * 2 * token_bytes), rel=0.01)


def test_without_our_flag_vllm_is_untouched() -> None:
    assert run_engine()["implementation"] == ["CPUAttentionBackendImpl"], "vLLM's own"


@pytest.mark.newest
def test_the_engine_is_ours_whatever_other_plugins_do_and_after_a_refusal() -> None:
    """`VLLM_PLUGINS` keeps ours out, another takes the name of vLLM's CPU backend; and an engine was refused in this
    process before.
    """
    options = {"dtype": "float32", "waves": PROMPT, "max_tokens": 48}
    plain = run_engine(**options, **INT4)
    offload = INT4 | {"kv_offloading_size": 1.0, "worker_extension_cls": EXTENSION}
    alone = run_engine(mutate="keep_out", **options, **INT4, worker_extension_cls=EXTENSION, refused=offload)
    assert alone["implementation"] == ["SawAttentionImpl"]
    assert alone["tokens"] == plain["tokens"]
    assert "sawkv: KV cache format int4-k128-v128" in alone["log"][0], "what docs tell users to look for"


def test_a_skipped_layer_keeps_vllms_cache_and_is_named() -> None:
    options = {"kv_cache_dtype_skip_layers": ["0", "foo"], "additional_config": {"sawkv": {"format": "int4-k64-v0"}}}
    result = run_engine(waves=PROMPT, dtype="float32", **INT4, **options)
    assert result["implementation"] == ["CPUAttentionBackendImpl", "SawAttentionImpl"]
    assert len(result["tokens"][0][0]) == 32
    log = "\n".join(result["log"])
    assert "serves 4 of 5 attention layers; vLLM's own cache is kept for model.layers.0.self_attn.attn (auto)" in log
    assert "vLLM ignores what it does not know in --kv-cache-dtype-skip-layers: foo" in log
    token_bytes = 2 * (4 * 136 + 2 * 4 * 128)  # two KV heads: four layers of INT4, one of fp32
    assert result["kv_tokens"] == pytest.approx((64 << 20) / token_bytes, rel=0.01)


@pytest.mark.newest
def test_a_wrong_format_is_refused_at_start_up() -> None:
    for format_name, message in (
        ("int4-k48-v0", "power of two"),
        ("int8-k0-v0", "expected --kv-cache-dtype int8_per_token_head"),
    ):
        assert message in run_engine(**INT4, additional_config={"sawkv": {"format": format_name}})["error"]
    assert "got colour" in run_engine(**INT4, additional_config={"sawkv": {"colour": 1}})["error"]
    wide = run_engine(kv_cache_dtype="fp8", additional_config={"sawkv": {"format": "bf16-k128-v128"}})
    assert "expected --kv-cache-dtype bfloat16, got fp8" in wide["error"]


def test_a_head_dim_that_does_not_fit_is_refused_at_start_up(tmp_path: Path) -> None:
    error = run_engine(**shrunk_model(tmp_path, head_dim=72))["error"]
    assert "head_dim: expected a multiple of 16" in error or "head_size" in error


@pytest.mark.parametrize(
    "options",
    [
        {"kv_cache_dtype": "int8_per_token_head"},
        pytest.param({"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}, marks=pytest.mark.newest),
    ],
)
def test_sliding_windows_are_served_in_int8_and_by_several_workers(options: dict[str, Any], tmp_path: Path) -> None:
    """`test_windows.py` has the rest."""
    window = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 16}
    result = run_engine(waves=PROMPT, **shrunk_model(tmp_path, **window) | options)
    assert len(result["tokens"][0][0]) == 32, result


def test_mla_is_refused_at_start_up(tmp_path: Path) -> None:
    mla = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "kv_lora_rank": 64,
        "q_lora_rank": None,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": None,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "head_dim": None,
    }
    result = run_engine(waves=PROMPT, **shrunk_model(tmp_path, **mla))
    assert "MLA" in result.get("error", "no error")


def test_attention_in_chunks_is_refused_at_start_up(tmp_path: Path) -> None:
    llama4 = {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "attention_chunk_size": 64,
        "no_rope_layers": [1],
        "intermediate_size_mlp": 256,
        "interleave_moe_layer_step": 1,
        "moe_layers": [],
        "num_local_experts": 2,
        "use_qk_norm": False,
        "max_position_embeddings": 4096,
    }
    error = run_engine(waves=PROMPT, **shrunk_model(tmp_path, **llama4))["error"]
    assert "sawkv cannot serve this configuration: attention in chunks (attention_chunk_size)" in error


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, as vLLM is imported
def test_a_changed_vllm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from sawkv.integrations.vllm.contract import check_contract

    check_contract.__wrapped__()
    fields = {name: field for name, field in CommonAttentionMetadata.__dataclass_fields__.items() if name != "seq_lens"}
    monkeypatch.setattr(CommonAttentionMetadata, "__dataclass_fields__", fields)
    with pytest.raises(UnsupportedError, match=r"needs CommonAttentionMetadata\.seq_lens"):
        check_contract.__wrapped__()


def test_the_plugin_is_found_by_its_entry_point() -> None:
    from importlib.metadata import entry_points

    assert [point.value for point in entry_points(group="vllm.general_plugins", name="sawkv")] == [
        "sawkv.integrations.vllm:register"
    ]
