"""Whatever is given to a parser of ours, it is used or refused by name: no other exception, no endless loop, no huge
allocation.

Format names of any text are in tests/test_format.py, calibration files in tests/test_calibration.py.
"""

from __future__ import annotations

import contextlib
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sawkv import CacheFormat, FormatError, PagedKVCache, PageLayout, cli, decode_attention, gather
from sawkv.errors import SawkvError
from sawkv.format.spec import HEAD_DIMS
from sawkv.integrations.vllm import server
from sawkv.integrations.vllm.config import KV_CACHE_DTYPE_CODECS, SawConfig, dtype_codec

names = st.one_of(
    st.from_regex(
        r"(int4|int3|int4v2|int8|bf16|fp16|fp32|int5|[a-z0-9]{1,6})(-k[0-9]{1,4})?(-v[0-9]{1,4})?", fullmatch=True
    ),
    st.text(max_size=200),
)


@given(
    names,
    st.one_of(st.sampled_from(HEAD_DIMS), st.integers()),
    st.integers(-(2**70), 2**70),
    st.integers(-(2**70), 2**70),
)
def test_a_layout_is_whole_or_refused(name: str, head_dim: int, page_size: int, num_kv_heads: int) -> None:
    try:
        layout = PageLayout(CacheFormat.parse(name), num_kv_heads, head_dim, page_size)
    except FormatError as error:
        refusal = str(error)
    else:
        refusal = ""
    assert len(refusal) < 500
    if refusal:
        return
    assert layout.span_bytes == page_size * layout.token_bytes
    assert layout.span_bytes % 16 == layout.v_codes_offset % 16 == 0
    assert layout.token_bytes == layout.k_row_bytes + layout.v_row_bytes + 2 * layout.meta_bytes


@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=1, max_size=64), st.sampled_from(["int4", "int3", "int4v2", "int8", "bf16", "fp32-k16-v16"]))
def test_any_bytes_in_pages_are_read_alike_by_all_backends(seed: bytes, name: str) -> None:
    layout = PageLayout(CacheFormat.parse(name), 2, 64, 16)
    size = 4 * layout.num_kv_heads * layout.span_bytes
    pages = torch.frombuffer(bytearray((seed * (size // len(seed) + 1))[:size]), dtype=torch.uint8).clone()
    cache = PagedKVCache(pages.view(layout.pages_shape(4)), layout)
    table, lengths = torch.tensor([[3, 1, 0, 2]], dtype=torch.int32), torch.tensor([50], dtype=torch.int32)
    starts = torch.tensor([0, 2], dtype=torch.int32)
    read = []
    for backend in ("cpu", "reference"):
        k, v = torch.zeros(2, 50, 2, 64)
        gather(cache, table, lengths, torch.tensor([0, 50], dtype=torch.int32), k, v, backend=backend)
        read.append(torch.stack([k, v]))
        decode_attention(
            torch.ones(2, 4, 64), cache, table, lengths, starts, softmax_scale=0.1, max_query_len=2, backend=backend
        )
    torch.testing.assert_close(*read, rtol=0, atol=0, equal_nan=True)


# ---- vLLM's options

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=6,
)
paths = st.sampled_from(["\x00", "", "/", "models", "models/none.safetensors", "x" * 5000])
settings_of_ours = st.dictionaries(
    st.sampled_from(["format", "calibration", "colour"]), names | paths | json_values, max_size=3
)


@settings(max_examples=300)
@given(
    json_values | st.fixed_dictionaries({"sawkv": json_values | settings_of_ours}),
    st.sampled_from([*KV_CACHE_DTYPE_CODECS, "auto", "fp8", "bfloat16"]) | st.text(max_size=10),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
)
def test_options_of_vllm_are_used_or_refused(additional_config: Any, kv_cache_dtype: str, dtype: torch.dtype) -> None:
    vllm_config: Any = SimpleNamespace(
        additional_config=additional_config,
        model_config=SimpleNamespace(dtype=dtype, hf_config=SimpleNamespace()),
        cache_config=SimpleNamespace(cache_dtype=kv_cache_dtype),
        speculative_config=None,
    )
    with contextlib.suppress(SawkvError):
        config = SawConfig.from_vllm(vllm_config, kv_cache_dtype)
        assert config is None or dtype_codec(config.format) in (
            "bf16",
            "fp16",
            "fp32",
            KV_CACHE_DTYPE_CODECS.get(kv_cache_dtype),
        )


# ---- the command line

words = st.one_of(
    st.sampled_from(
        [
            "report",
            "serve",
            "plan",
            "eval",
            "prepare",
            "--out",
            "--format",
            "--head-dim",
            "--gpu-memory",
            "--context",
            "--calibration",
            "--help",
            "--version",
            "--",
        ]
    ),
    st.sampled_from(
        [
            "int4",
            "int4-k128-v128",
            "128",
            "-1",
            "80GiB",
            "1e400",
            "0",
            "models/none",
            "--fo",
            "\x00",
            "",
            "=",
            "--head-dim=64",
        ]
    ),
    st.text(max_size=12),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(words, max_size=6))
@example(["--out", "report", "report"])  # an option of the command before it
def test_the_command_line_answers_or_refuses(argv: list[str]) -> None:
    started: list[Any] = []
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):

        def start(command: list[str], **_: Any) -> SimpleNamespace:
            started.append(command)
            return SimpleNamespace(wait=lambda *_: 0, terminate=lambda: None)

        patch.setattr(server, "subprocess", SimpleNamespace(Popen=start))
        patch.setenv("HF_HUB_OFFLINE", "1")
        try:
            status = cli.main(argv)
        except SystemExit as end:  # argparse
            status = end.code if isinstance(end.code, int) else 2
    assert status in (0, 2)
    assert all(isinstance(word, str) for command in started for word in command)
    if status == 2:
        assert output.getvalue().strip(), "a refusal says why"
