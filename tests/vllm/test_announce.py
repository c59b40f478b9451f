"""What vLLM's log says of sawkv when an engine starts."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sawkv.errors import SawkvError

# Of torch.jit, as vLLM is imported.
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

INT4, INT8 = "int4_per_token_head", "int8_per_token_head"


def test_lost_capacity_is_said_with_its_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    from sawkv import CacheFormat, PageLayout
    from sawkv.integrations.vllm import announce

    said: list[str] = []
    for level in ("info_once", "warning_once"):
        monkeypatch.setattr(
            announce.logger, level, lambda text, *arguments: said.append(text % arguments), raising=False
        )
    layout = PageLayout(CacheFormat("int4"), 2, 128, 64)
    right = 64 * 2 * 136
    announce.say_pages(SimpleNamespace(page_size_bytes=right), layout, 64)  # type: ignore[arg-type]
    assert said == []
    announce.say_pages(SimpleNamespace(page_size_bytes=64 * 2 * 512), layout, 64)  # type: ignore[arg-type]
    assert "pads our pages from 17408 to 65536 bytes" in said[0]
    assert "hold 1.00 times the tokens of a 16-bit cache and not 3.76 times" in said[0]
    large = PageLayout(CacheFormat("int4"), 2, 128, 1024)
    announce.say_pages(SimpleNamespace(page_size_bytes=1024 * 2 * 136), large, 0)  # type: ignore[arg-type]
    announce.say_pages(SimpleNamespace(page_size_bytes=1024 * 2 * 136), large, 1024)  # type: ignore[arg-type]
    assert said[1:] == [
        "sawkv: blocks have 1024 tokens, so the prefix cache finds multiples of 1024 tokens, and shorter prompts never"
    ]


def test_a_calibration_for_less_than_the_context_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from sawkv import CacheFormat
    from sawkv.integrations.vllm import announce
    from sawkv.prepare.calibration import Calibration

    said: list[str] = []
    monkeypatch.setattr(
        announce.logger, "warning_once", lambda text, *arguments: said.append(text % arguments), raising=False
    )

    def say(num_buckets: int, context: int) -> int:
        centers = torch.ones(2, num_buckets, 1, 64), torch.ones(2, 1, 64)
        announce.warn_short(Calibration(CacheFormat("int4").resolve(64), "a model", *centers), context)
        return len(said)

    assert say(3, 6144) == say(3, 100) == 0
    assert say(128, 1 << 20) == 0, "there are never more"
    assert say(1, 6144) == 0, "one center may be for all positions"
    assert say(2, 6144) == 1
    assert "centers of K for 4096 positions, and --max-model-len is 6144" in said[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_states_of_16_bits_would_hold_is_said(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3.5-35B-A3B's layers: 10 of attention, 30 with states; in 40 GiB."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

    from sawkv.integrations.vllm import announce

    said: list[str] = []
    monkeypatch.setattr(announce.logger, "info", lambda text, *rest: said.append(text % rest))
    block_size = 4096 if dtype == torch.float32 else 2112
    page = block_size * 528
    attention: Any = FullAttentionSpec(block_size=block_size, num_kv_heads=2, head_size=132, dtype=torch.int8)
    assert attention.page_size_bytes == attention.unpadded_page_size_bytes == page
    state: Any = MambaSpec(
        block_size=block_size,
        shapes=((3, 8192), (32, 128, 128)),
        dtypes=(torch.bfloat16, dtype),
        page_size_padded=page,
        mamba_cache_mode="align",
    )
    cache: Any = SimpleNamespace(
        num_blocks=(40 << 30) // (10 * page),
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in (attention, state, state, state)],
    )
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.bfloat16, max_model_len=32768),
        cache_config=SimpleNamespace(mamba_cache_mode="align"),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
    )
    announce.say_states(config, cache)
    if dtype == torch.bfloat16:
        assert said == []
    else:
        (line,) = said
        assert "holds 4,646,034 tokens; with states of 16 bits" in line
        assert "would hold some 5,732,910" in line, "plan: 5,735,889, as it knows what 32 bits leave of the last block"


def test_the_log_names_the_kernels_that_read_the_real_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    from sawkv import CacheFormat, PageLayout
    from sawkv.integrations.vllm import announce

    said: list[str] = []
    monkeypatch.setattr(
        announce.logger, "warning_once", lambda text, *arguments: said.append(text % arguments), raising=False
    )
    choose = {16: "cuda", 64: "cuda", 48: "triton"}
    monkeypatch.setattr(
        announce, "select_backend", lambda device, layout: SimpleNamespace(name=choose[layout.page_size])
    )
    for page_size in (16, 64, 48):
        announce.say_kernels(PageLayout(CacheFormat("int4"), 2, 128, page_size), torch.device("cpu"))
    assert said == ["sawkv: pages have 48 tokens, which triton kernels read, and not cuda kernels"]


def worker(
    layers: dict[str, Any],
    backend: object = None,
    skipped: Sequence[str] = (),
    draft: object = None,
    stages: int = 1,
    device: str = "cpu",
) -> Any:
    """What `say_layers` reads of one of vLLM's, which has these layers."""
    config = SimpleNamespace(
        attention_config=SimpleNamespace(backend=backend),
        compilation_config=SimpleNamespace(static_forward_context=layers),
        cache_config=SimpleNamespace(kv_cache_dtype_skip_layers=list(skipped)),
        speculative_config=draft,
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
    )
    return SimpleNamespace(vllm_config=config, device=torch.device(device))


def test_layers_that_are_not_ours_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers import attention
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from sawkv.integrations.vllm import announce
    from sawkv.integrations.vllm.backend import SawAttentionImpl

    said: list[str] = []
    monkeypatch.setattr(attention, "Attention", SimpleNamespace)
    monkeypatch.setattr(announce.logger, "log", lambda level, text, *rest: said.append(f"{level} {text % rest}"))
    monkeypatch.setattr(announce.logger, "warning", lambda text, *rest: said.append(text % rest))

    def say(
        ours: set[int],
        skipped: list[str],
        dtype: str = "auto",
        device: str = "cpu",
        attending: int = 6,
        draft: object = None,
        stages: int = 1,
        **others: Any,
    ) -> list[str]:
        said.clear()
        impls = {i: object.__new__(SawAttentionImpl) if i in ours else object() for i in range(attending)}
        layers: dict[str, Any] = {
            f"layers.{i}": SimpleNamespace(impl=impl, kv_cache_dtype=INT4 if i in ours else dtype)
            for i, impl in impls.items()
        }
        layers |= {"layers.6.mamba": SimpleNamespace()} | others
        announce.say_layers(
            worker(
                layers, backend=AttentionBackendEnum.CUSTOM, skipped=skipped, draft=draft, stages=stages, device=device
            )
        )
        return said

    assert say(set(range(6)), []) == []
    assert say(set(), [], attending=0) == ["sawkv: serves nothing: this model has no layer of attention"]
    assert say(set(), [], attending=0, stages=2) == [], "others may have some"
    assert say(set(range(6)), ["17", "foo"], stages=2) == [
        "sawkv: vLLM ignores what it does not know in --kv-cache-dtype-skip-layers: foo"
    ], "another stage may have layer 17"
    assert say(set(range(1, 6)), ["0", "sliding_window", "17", "foo"]) == [
        "20 sawkv: serves 5 of 6 attention layers; vLLM's own cache is kept for layers.0 (auto)",
        "sawkv: vLLM ignores what it does not know in --kv-cache-dtype-skip-layers: 17, foo",
    ]
    (line,) = say(set(), [str(i) for i in range(6)])
    assert line.startswith(
        "30 sawkv: serves none of 6 attention layers; vLLM's own cache is kept for layers.0 (auto), "
    )
    assert line.endswith("layers.3 (auto) and 2 more")
    with pytest.raises(SawkvError, match=r"got 2 without: layers\.0 has object\. Set VLLM_PLUGINS=sawkv"):
        say({1, 2, 3, 4}, [], INT8)  # another plugin's choice: on a CPU nonsense
    assert len(say({1, 2, 3, 4}, [], INT8, "cuda", draft=object())) == 1, "a draft's: vLLM's own, and right"
    wide = SimpleNamespace(impl=object(), kv_cache_dtype=INT4, head_size=192, head_size_v=128)
    with pytest.raises(SawkvError, match=r"wide has object \(head_dim 128 of V apart from 192 of K\)\. To serve it in"):
        say({0, 1, 2, 3, 4, 5}, [], device="cuda", wide=wide)  # its model chose the backend

    class Sparse:
        """Asks vLLM for no backend, and need not have an implementation."""

        kv_cache_dtype = INT4

    for device in ("cpu", "cuda"):
        with pytest.raises(SawkvError, match=r"got 1 without: sparse has Sparse\. To serve it in 16 bits"):
            say({0, 1, 2, 3, 4, 5}, [], device=device, sparse=Sparse())


@pytest.mark.parametrize("ours", [(True, False), (False, True)], ids=str)
def test_layers_that_share_pages_read_them_as_they_were_written(
    ours: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer skipped alone would take our bytes for numbers of 16 bits."""
    from sawkv.integrations.vllm import announce
    from sawkv.integrations.vllm.backend import SawAttentionImpl

    monkeypatch.setattr(announce.logger, "log", lambda *_: None)

    def say(ours: tuple[bool, bool], knows: bool = True) -> None:
        impls: list[Any] = [object.__new__(SawAttentionImpl) if each else SimpleNamespace() for each in ours]
        impls[1].kv_sharing_target_layer_name = "layers.0" if knows else None
        layers = {
            f"layers.{i}": SimpleNamespace(impl=impl, kv_cache_dtype=INT4 if own else "auto")
            for i, (impl, own) in enumerate(zip(impls, ours, strict=True))
        }
        layers["layers.1"].kv_sharing_target_layer_name = "layers.0"
        announce.say_layers(worker(layers))

    say((True, True))
    say((False, False))
    with pytest.raises(SawkvError, match=r"got layers\.1 \(.*\) with those of layers\.0 \(.*\)\. Name both in"):
        say(ours)
    with pytest.raises(SawkvError, match="A draft that reads the model's pages"):
        say((True, True), knows=False)
