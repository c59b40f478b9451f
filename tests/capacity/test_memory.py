"""vLLM's arithmetic: what it reported on two cards, its defaults by card, and blocks of models whose layers differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.shapes import SHAPES
from sawkv.capacity.caches import KVCache, engine_caches
from sawkv.capacity.memory import (
    GIB,
    Plan,
    Setting,
    card,
    cut_blocks,
    longest_context,
    make_plan,
    size_bytes,
)
from sawkv.capacity.model import ModelShape, read_shape
from sawkv.capacity.weights import weights_of
from sawkv.checkpoint import Checkpoint
from sawkv.errors import SawkvError, UnsupportedError
from sawkv.format.spec import CacheFormat
from tests.capacity.configs import CONFIGS

H100 = Setting(card("80GiB")[0], context=17408, gpu_memory_utilization=0.90, max_num_batched_tokens=16384)
H200 = replace(H100, gpu_memory=card("141GiB")[0])
QWEN3_8B_BYTES = 16_381_470_720


def caches(shape: ModelShape) -> list[KVCache]:
    return [*engine_caches(shape), KVCache.of_format(CacheFormat("int4"), shape)]


def plans(name: str, setting: Setting, weight_bytes: int = QWEN3_8B_BYTES) -> list[Plan]:
    shape = read_shape((CONFIGS | SHAPES)[name])
    return [make_plan(shape, setting, cache, weight_bytes) for cache in caches(shape)]


@pytest.mark.parametrize(
    ("name", "setting", "bf16", "int4"),
    [
        ("qwen3-8b", H100, 394_576, 1_481_040),  # vLLM 0.26
        ("qwen3-8b", H200, 791_520, 2_976_448),
        ("gemma-4-26b-a4b", replace(H200, context=33280), 351_008, 1_356_290),  # vLLM 0.33
        ("qwen3.5-35b-a3b", replace(H200, context=33280), 2_446_080, 6_249_984),
    ],
)
def test_within_two_percent_of_what_vllm_reported(name: str, setting: Setting, bf16: int, int4: int) -> None:
    """At gpu_memory_utilization 0.90 on one card: docs/results/serving.jsonl."""
    weights = weights_of(Checkpoint(name, SHAPES[name], Path("nowhere")), read_shape(SHAPES[name])).nbytes
    wide, _, narrow = plans(name, setting, weights)
    assert wide.tokens == pytest.approx(bf16, rel=0.02)
    assert narrow.tokens == pytest.approx(int4, rel=0.02)
    forgotten = replace(setting, gpu_memory=setting.gpu_memory + 8 * GIB)
    assert plans(name, forgotten, weights)[0].tokens != pytest.approx(bf16, rel=0.02), "the control"


def test_more_cards_hold_more_and_weights_that_do_not_fit_hold_nothing() -> None:
    one, two = (plans("qwen3-32b", replace(H100, tensor_parallel=ranks), 65_524_246_528)[-1] for ranks in (1, 2))
    assert two.tokens > 4 * one.tokens  # half the weights, and half the KV heads on each card
    assert one.fits
    none = plans("qwen3-8b", H100, 200 * GIB)[-1]
    assert (none.kv_cache, none.tokens, none.fits) == (0, 0, False)


@pytest.mark.parametrize(
    ("memory", "name", "batched_tokens", "seqs"),
    [
        (178, "", 16384, 1024),  # B200
        (160, "NVIDIA A100-SXM4-160GB", 16384, 1024),
        (139.8, "NVIDIA H200", 8192, 1024),
        (79.1, "", 8192, 1024),
        (79.3, "NVIDIA A100-SXM4-80GB", 2048, 256),
        (119.7, "NVIDIA GB10", 2048, 256),
        (69.9, "", 2048, 256),
        (23.6, "NVIDIA GeForce RTX 4090", 2048, 256),
    ],
)
def test_defaults_by_card_are_those_of_vllms_server(memory: float, name: str, batched_tokens: int, seqs: int) -> None:
    setting = Setting(int(memory * GIB), 16384, name)
    assert (setting.batched_tokens, setting.seqs) == (batched_tokens, seqs)
    given = replace(setting, max_num_batched_tokens=100, max_num_seqs=7)
    assert (given.batched_tokens, given.seqs) == (100, 7)


def test_defaults_are_capped_as_vllm_caps_them() -> None:
    # A token more than 1,024 requests of 4 has nothing to do.
    assert Setting(80 * GIB, context=4).batched_tokens == 4096
    assert Setting(80 * GIB, context=16384, max_num_batched_tokens=512).seqs == 512


def test_a_block_grows_until_attentions_page_holds_a_state() -> None:
    """Granite 4 H Small. A state: 3 x 8448 x 2 + 128 x 8192 x 2 = 2,147,840 bytes. Attention: 8 x 128 x 4 = 4,096 bytes
    a token in 16 bits, 8 x 2 x 68 = 1,088 in INT4. 2,147,840 / 4,096 = 524.4, 33 times 16 tokens; / 2,048, 66 times 16;
    / 1,088 = 1974.1, 31 times 64.

    36 states in 9 groups of 4, as many as there are layers of attention; a request holds 3 blocks of each.
    """
    shape = read_shape(CONFIGS["granite-4-h-small"])
    bf16, fp8, int4 = (cut_blocks(shape, H100, cache) for cache in caches(shape))
    assert [blocks.block_size for blocks in (bf16, fp8, int4)] == [528, 1056, 1984]
    assert [blocks.least_prefix_hit for blocks in (bf16, fp8, int4)] == [528, 1056, 1984]
    assert int4.nbytes == 4 * 1984 * 1088
    assert (int4.of_states, int4.of_request) == (27, 27 + 9)  # 17,408 tokens are 8.8 blocks of attention


def test_pages_of_unlike_layers_take_the_bytes_of_the_largest() -> None:
    """Windows with 8 heads of 256: 8,192 bytes a token in 16 bits, 2,112 in INT4. Others with 2 of 512: half of each,
    so that their blocks hold twice the tokens.

    Heads of 128 and 256 take 1,088 and 528 bytes in INT4. That does not come out even, and pages are padded.
    """
    config = CONFIGS["gemma-4-26b-a4b"]
    shape = read_shape(config)
    bf16, _, int4 = (cut_blocks(shape, H100, cache) for cache in caches(shape))
    assert (bf16.nbytes, bf16.block_size, bf16.least_prefix_hit) == (5 * 16 * 8192, 32, 32)
    assert (int4.nbytes, int4.block_size, int4.least_prefix_hit) == (5 * 64 * 2112, 128, 128)
    # 5 groups of windows: 1,023 tokens and two steps of 16,384 are more than the context, so 17,408 / 64 blocks and
    # one. One group of others.
    assert int4.of_request == 5 * (272 + 1) + 136
    shape = read_shape(config | {"head_dim": 128, "global_head_dim": 256})
    padded = cut_blocks(shape, H100, caches(shape)[-1])
    assert (padded.nbytes, padded.block_size, padded.least_prefix_hit) == (5 * 64 * 1088, 64, 64)
    assert padded.of_request == 5 * (272 + 1) + 272


def test_all_windows_of_one_size_share_a_group() -> None:
    """Mistral 7B: 4,095 tokens and two steps of 2,048 are 8,191, so 128 blocks of 64 and one, of 32 layers."""
    shape = read_shape(CONFIGS["mistral-7b"])
    blocks = cut_blocks(shape, replace(H100, max_num_batched_tokens=2048), caches(shape)[-1])
    assert (blocks.of_request, blocks.nbytes) == (129, 32 * 64 * 1088)


def test_the_newest_tokens_take_blocks_of_the_same_bytes() -> None:
    """17,408 tokens are 272 blocks of 64. The newest 64 lie in up to 5 of 16, which 8,192 of 8,704 bytes hold."""
    shape = read_shape(CONFIGS["qwen3-8b"])
    blocks = cut_blocks(shape, H100, KVCache.of_format(CacheFormat.parse("int4-r64"), shape))
    assert (blocks.of_request, blocks.nbytes, blocks.block_size) == (272 + 5, 36 * 8 * 64 * 136, 64)
    assert blocks.least == 272 + 1089 + 1, (
        "of two steps of 16,384 tokens 17,408 can be one request's; vLLM keeps a block back"
    )


def test_newest_tokens_that_vllm_would_refuse_have_no_plan() -> None:
    for name, words in (("gpt-oss-120b", "sliding windows"), ("falcon-h1-1.5b", "recurrent layers")):
        with pytest.raises(UnsupportedError, match=words):
            KVCache.of_format(CacheFormat.parse("int4-r64"), read_shape(CONFIGS[name]))
    shape = read_shape(CONFIGS["qwen3-8b"])
    with pytest.raises(UnsupportedError, match="speculation"):
        KVCache.of_format(CacheFormat.parse("int4-r64"), shape, speculates=True)
    unlike = replace(shape, attention=(replace(shape.attention[0], num_kv_heads=4), *shape.attention[1:]))
    with pytest.raises(UnsupportedError, match="unlike KV heads"):
        KVCache.of_format(CacheFormat.parse("int4-r64"), unlike)


def test_the_longest_context_is_the_last_with_which_vllm_starts() -> None:
    shape = read_shape(CONFIGS["qwen3-8b"])
    setting, cache = Setting(card("20GiB")[0], 40960), caches(shape)[0]
    longest = longest_context(shape, setting, cache, QWEN3_8B_BYTES)
    assert 1000 < longest < 40960
    assert make_plan(shape, replace(setting, context=longest), cache, QWEN3_8B_BYTES).fits
    assert not make_plan(shape, replace(setting, context=longest + 1), cache, QWEN3_8B_BYTES).fits
    assert longest_context(shape, setting, cache, 20 * GIB) == 0


def test_heads_that_cards_do_not_divide_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="--tensor-parallel: expected a divisor of 32 and 8 heads, got 3"):
        plans("qwen3-8b", replace(H100, tensor_parallel=3))
    with pytest.raises(UnsupportedError, match="a divisor of 48 heads and 3072 channels of states, got 32"):
        make_plan(
            replace(read_shape(CONFIGS["falcon-h1-1.5b"]), attention=read_shape(CONFIGS["qwen3-8b"]).attention),
            replace(H100, tensor_parallel=32),
            KVCache("bf16", element_bytes=2),
            GIB,
        )


def test_a_size_is_the_cards_and_less_is_reported() -> None:
    assert card("80GB") == card("80GiB") == card("81920MiB") == (pytest.approx(79.1 * GIB, rel=1e-3), "")
    assert size_bytes("--weights", "1.5GiB") == 3 * GIB // 2
    for text in ("80", "0GiB", "80 apples", "-1GiB", "GiB", "٨0GiB", ""):
        with pytest.raises(SawkvError, match=f"--weights: expected a number with a unit such as 80GiB, got '{text}'"):
            size_bytes("--weights", text)
