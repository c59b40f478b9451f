"""Which layers are ours: each is judged by its own dtype, shape and model, whatever other plugins register and vLLM's
own choice says.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sawkv import CacheFormat
from sawkv.errors import SawkvError

# Of torch.jit, as vLLM is imported.
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.next,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

INT4, INT8 = "int4_per_token_head", "int8_per_token_head"
OWN4, OWN8 = "sawkv_int4", "sawkv_int8"


class Theirs:
    """A backend of vLLM's."""

    class Builder:
        def __init__(self, spec: Any, names: list[str], config: Any, device: Any) -> None:
            self.dtype = config.cache_config.cache_dtype

    @classmethod
    def get_builder_cls(cls) -> type:
        return cls.Builder


class Choice:
    """vLLM's own choice, which notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def __call__(self, backend: Any, attn_selector_config: Any, **others: Any) -> type:
        self.asked.append(backend)
        return Theirs

    def cache_clear(self) -> None: ...


@pytest.fixture
def choice() -> Choice:
    return Choice()


@pytest.fixture
def select(choice: Choice, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Asks `Selection` for one layer; the options are of the layer, the configuration and the platform."""
    from vllm.compilation import backends
    from vllm.v1.attention.selector import AttentionSelectorConfig

    from sawkv.integrations.vllm import selection

    selection.install()
    said: list[str] = []
    for level in ("info_once", "warning_once"):
        monkeypatch.setattr(
            selection.logger, level, lambda text, *arguments: said.append(text % arguments), raising=False
        )

    def ask(
        dtype: str,
        *,
        run: str | None = None,
        entry: Any = None,
        backend: str | None = None,
        gpu: bool = False,
        **others: Any,
    ) -> Any:
        tag = others.pop("tag", "backbone")
        layer = {name: others.pop(name) for name in sorted(others) if name in AttentionSelectorConfig._fields}
        config = SimpleNamespace(
            additional_config={} if entry is None else {"sawkv": entry},
            model_config=SimpleNamespace(
                dtype=torch.bfloat16,
                hf_config=None,
                attention_chunk_size=None,
                multimodal_config=others.pop("sees", None),
            ),
            cache_config=SimpleNamespace(cache_dtype=run or dtype, kv_offloading_size=None),
            parallel_config=SimpleNamespace(),
            speculative_config=None if tag == "backbone" else object(),
            kv_transfer_config=None,
            compilation_config=SimpleNamespace(static_forward_context={"mamba": object()}),
        )
        for name, value in others.items():
            setattr(config, name, value)
        monkeypatch.setattr(selection, "get_current_vllm_config", lambda: config)
        monkeypatch.setattr(selection, "current_platform", SimpleNamespace(is_cpu=lambda: not gpu))
        monkeypatch.setattr(backends, "model_tag", tag)
        chosen = None if backend is None else selection.AttentionBackendEnum[backend]
        layer = {"head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": dtype, "block_size": None} | layer
        known = AttentionSelectorConfig(**layer)
        found = selection.Selection(choice)(backend=chosen, attn_selector_config=known, num_heads=8)
        return found.__name__, [getattr(asked, "name", asked) for asked in choice.asked], said

    return ask


OURS = "SawAttentionBackend"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dtype": INT4}, OURS),
        ({"dtype": INT8}, OURS),
        ({"dtype": OWN4}, OURS),
        ({"dtype": OWN8, "entry": {"format": "int8-k64-v0"}}, OURS),
        ({"dtype": INT4, "use_mm_prefix": True}, OURS),  # Gemma 4 without its tower
        ({"dtype": "auto"}, "Theirs"),
        ({"dtype": "fp8"}, "Theirs"),
        ({"dtype": "auto", "entry": {"format": "bf16-k128-v128"}}, OURS),
        ({"dtype": "auto", "run": INT4, "entry": {"format": "int4-k128-v128"}}, "Theirs"),  # a skipped layer
        ({"dtype": "auto", "run": INT4}, "Theirs"),
        (
            {"dtype": INT4, "entry": {"format": "int4-k128-v128"}, "tag": "draft_model", "head_size": 64},
            OURS,
        ),  # by its own default
        ({"dtype": "auto", "entry": {"format": "int4-k128-v128"}, "tag": "draft_model"}, "Theirs"),
        ({"dtype": INT8, "entry": {"format": "int4-k128-v128"}, "tag": "eagle_head"}, OURS),
        ({"dtype": "fp8", "entry": {"calibration": "there is no such file"}, "tag": "eagle_head"}, "Theirs"),
        (
            {"dtype": INT4, "entry": {"calibration": "there is no such file"}, "tag": "draft_model"},
            OURS,
        ),  # a calibration is the target's
    ],
)
def test_each_layer_is_judged_by_itself(options: dict[str, Any], expected: str, select: Any) -> None:
    assert select(**options)[0] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": INT4, "use_mla": True}, "this configuration: MLA"),
        ({"dtype": INT4, "use_mm_prefix": True, "sees": object()}, r"tokens of an image \(add --language-model-only"),
        ({"dtype": INT4, "use_mm_prefix": True, "sees": {}, "gpu": True, "backend": "CUSTOM"}, "language-model-only"),
        ({"dtype": INT4, "use_non_causal": True}, "attention that is not causal"),
        (
            {"dtype": INT4, "use_mla": True, "tag": "draft_model"},
            'the draft model: MLA.*"kv_cache_dtype": "auto" to --speculative-config',
        ),
        (
            {"dtype": "fp8", "entry": {"format": "int4"}},
            rf"expected --kv-cache-dtype ({INT4}|{OWN4}), got fp8",
        ),
        (
            {"dtype": "auto", "entry": {}},
            rf"expected --kv-cache-dtype ({INT4} or {INT8}|{OWN4} or {OWN8}) beside it.*got auto",
        ),
        ({"dtype": OWN4, "entry": {"format": "int8"}}, rf"expected --kv-cache-dtype ({INT8}|{OWN8}), got {OWN4}"),
        ({"dtype": OWN4, "gpu": True}, f"{OWN4} without --attention-backend CUSTOM"),
        ({"dtype": OWN8, "gpu": True, "backend": "TRITON_ATTN"}, f"{OWN8} without --attention-backend CUSTOM"),
        (
            {"dtype": OWN4, "gpu": True, "tag": "draft_model", "entry": {"format": "int4"}},
            f'{OWN4} without "attention_backend": "CUSTOM" in --speculative-config',
        ),
        ({"dtype": INT4, "entry": {"format": "int4"}, "gpu": True}, "without --attention-backend CUSTOM"),
        ({"dtype": INT4, "entry": {}, "gpu": True, "backend": "TRITON_ATTN"}, "without --attention-backend CUSTOM"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options: dict[str, Any], message: str, select: Any) -> None:
    with pytest.raises(SawkvError, match=message):
        select(**options)


@pytest.mark.parametrize(
    ("options", "asked", "words"),
    [
        ({"backend": "CUSTOM"}, "CUSTOM", ""),
        ({"backend": "CUSTOM", "dtype": OWN4}, "CUSTOM", ""),
        ({"backend": None}, None, "Add --attention-backend CUSTOM for sawkv's"),
        ({"backend": "TRITON_ATTN"}, "TRITON_ATTN", "sawkv: vLLM's own int4_per_token_head is used"),
        (
            {"backend": None, "tag": "draft_model", "entry": {"format": "int4"}},
            None,
            'Add "attention_backend": "CUSTOM" to --speculative',
        ),
        ({"backend": "CUSTOM", "tag": "draft_model", "entry": {"format": "int8"}}, "CUSTOM", ""),
        (
            {"backend": "CUSTOM", "dtype": "auto", "run": INT4},
            None,
            "some layers keep vLLM's own cache (auto)",
        ),  # vLLM is to choose
        ({"backend": "CUSTOM", "dtype": "auto", "tag": "draft_model"}, None, ""),
        ({"backend": "CUSTOM", "dtype": "auto"}, "CUSTOM", ""),  # which refuses by name: the user chose both
    ],
)
def test_on_a_gpu_layers_that_are_not_ours_get_vllms_choice(
    options: dict[str, Any], asked: Any, words: str, select: Any
) -> None:
    found, (got,), said = select(**({"dtype": INT4, "gpu": True} | options))
    assert (found, got) == ("Theirs", asked)
    assert words in "".join(said)
    assert bool(words) == bool(said)


def test_another_plugins_backend_is_not_taken_for_ours(select: Any) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from sawkv.integrations.vllm.selection import install

    try:
        for name in ("CUSTOM", "CPU_ATTN"):
            register_backend(AttentionBackendEnum[name], "another.plugin.Backend")
        assert select(INT4)[0] == OURS, "on a CPU no name is asked for"
        with pytest.raises(
            SawkvError, match=r"under --attention-backend CUSTOM, got another\.plugin\.Backend.*VLLM_PLUGINS=sawkv"
        ):
            select(INT4, gpu=True, backend="CUSTOM")
        assert select("auto", gpu=True, backend="FLASH_ATTN")[0] == "Theirs", "those who do not use us are not bothered"
    finally:
        AttentionBackendEnum["CPU_ATTN"].clear_override()
        install()


def test_it_is_put_in_place_once_and_a_changed_vllm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention import selector

    from sawkv.integrations.vllm import register
    from sawkv.integrations.vllm.selection import REPLACED, Selection, install

    monkeypatch.setattr(selector, REPLACED, Choice())
    register()
    first = getattr(selector, REPLACED)
    register()
    assert getattr(selector, REPLACED) is first
    assert isinstance(first, Selection)
    monkeypatch.delattr(selector, REPLACED)
    register()  # no error for engines that do not use us
    with pytest.raises(SawkvError, match=f"needs vllm.v1.attention.selector.{REPLACED}"):
        install()


def test_vllm_asks_the_function_that_is_replaced() -> None:
    """The seam itself, in the installed vLLM: a layer of 16 bits passes through it."""
    from unittest import mock

    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.v1.attention import selector

    from sawkv.integrations.vllm.selection import REPLACED, install

    install()
    with mock.patch.object(selector, REPLACED, return_value="asked") as asked, set_current_vllm_config(VllmConfig()):
        assert selector.get_attn_backend(128, torch.bfloat16, "auto") == "asked"
    assert set(asked.call_args.kwargs) >= {"backend", "attn_selector_config"}


def test_beside_ours_a_layer_of_a_cpu_is_judged_by_its_own_dtype_in_vllm_too() -> None:
    """vLLM's metadata builder goes by that of the engine, takes INT4 for FP8, and refuses it on CPUs
    without AVX-512.
    """
    from sawkv.integrations.vllm.selection import _by_its_own_dtype

    config = SimpleNamespace(cache_config=SimpleNamespace(cache_dtype=INT4))
    backend = _by_its_own_dtype(Theirs, "auto")
    assert issubclass(backend, Theirs)
    assert backend.get_builder_cls()(None, [], config, None).dtype == "auto"
    assert Theirs.get_builder_cls()(None, [], config, None).dtype == config.cache_config.cache_dtype == INT4
    assert _by_its_own_dtype(Theirs, "auto") is backend


def test_a_subclass_is_refused_in_the_words_of_the_option() -> None:
    from sawkv.integrations.vllm.refusals import refuse_subclass

    class FastPrefillAttentionBuilder: ...

    class SomethingNew: ...

    refuse_subclass(Choice, Choice)
    with pytest.raises(SawkvError, match="got --kv-sharing-fast-prefill"):
        refuse_subclass(FastPrefillAttentionBuilder, Choice)
    with pytest.raises(SawkvError, match=r"got attention of another kind \(vLLM's SomethingNew"):
        refuse_subclass(SomethingNew, Choice)


TRANSFER = SimpleNamespace(kv_connector="MooncakeConnector", kv_connector_extra_config=None)
NIXL = SimpleNamespace(kv_connector="NixlConnector", kv_connector_extra_config=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_transfer_config": TRANSFER}, "--kv-transfer-config with MooncakeConnector"),
        (
            {"kv_transfer_config": SimpleNamespace(**vars(NIXL), kv_connector_module_path="their")},
            "--kv-transfer-config with kv_connector_module_path their",
        ),
        (
            {"kv_transfer_config": TRANSFER, "cache_config": SimpleNamespace(kv_offloading_size=1.0)},
            "--kv-offloading-size with MooncakeConnector",
        ),
        ({"parallel_config": SimpleNamespace(decode_context_parallel_size=2)}, "--decode-context-parallel-size 2"),
        ({"parallel_config": SimpleNamespace(prefill_context_parallel_size=4)}, "--prefill-context-parallel-size 4"),
        ({"model_config": SimpleNamespace(attention_chunk_size=8192)}, "attention in chunks"),
        ({"diffusion_config": object()}, "attention in both directions among the tokens of a block"),
    ],
)
def test_options_are_named_as_the_user_gave_them(changes: dict[str, Any], message: str) -> None:
    from sawkv.integrations.vllm.refusals import of_configuration

    config = SimpleNamespace(
        model_config=SimpleNamespace(is_hybrid=False),
        cache_config=SimpleNamespace(),
        parallel_config=SimpleNamespace(),
        device_config=SimpleNamespace(device_type="cuda"),
        lora_config=None,
        speculative_config=None,
        kv_transfer_config=None,
    )
    assert of_configuration(config) == []
    vars(config).update(changes)
    (found,) = of_configuration(config)
    assert found.startswith(message)


def test_on_a_gpu_layers_of_fewer_bits_have_a_backend_that_knows_their_format(
    select: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sawkv.integrations.vllm import backend

    known = {cache_format: backend.backend_of(CacheFormat(cache_format)) for cache_format in ("int4", "int3")}
    asked: list[str] = []
    monkeypatch.setattr(backend, "backend_of", lambda cache_format: asked.append(str(cache_format)) or known["int3"])
    monkeypatch.setattr(Choice, "__call__", lambda self, **_: known["int4"])
    select(INT4, gpu=True, backend="CUSTOM", entry={"format": "int3"})
    assert asked == ["int3"]
    assert known["int3"].codec == "int3"


@pytest.mark.parametrize(
    ("gpu", "block", "page"),
    [
        (True, 64, 64),
        (True, 48, 16),
        (True, 512, 256),
        (True, 1056, 32),
        (True, 2112, 64),
        (True, 4096, 256),
        (False, 2112, 2112),
        (False, 16, 16),  # also of formats that do not quantize, where vLLM alone takes multiples of 32
    ],
)
def test_large_blocks_of_hybrids_are_cut_into_pages_on_a_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, block: int, page: int
) -> None:
    """vLLM's CPU runner clears new blocks as if each were a page, so there they have to be."""
    from vllm.config import VllmConfig
    from vllm.platforms import Platform
    from vllm.v1.attention.backend import MultipleOf
    from vllm.v1.worker.utils import select_common_block_size

    from sawkv.integrations.vllm import backend

    monkeypatch.setattr(backend, "current_platform", SimpleNamespace(is_cpu=lambda: not gpu))
    ours = backend.SawAttentionBackend
    assert ours.supports_block_size(block)
    assert ours.get_preferred_block_size(16) == 64
    assert not ours.supports_device_cpu_query_lens_mismatch()
    if gpu and hasattr(Platform, "_preferred_block_size_for_backends"):  # why `server.with_block_size` names it
        sizes = {"get_supported_kernel_block_sizes": staticmethod(lambda: [MultipleOf(16)])}  # FlashAttention's
        for backends, size in (([ours], 64), ([ours, type("Theirs", (ours,), sizes)], 16)):
            assert Platform._preferred_block_size_for_backends(backends, 16, VllmConfig()) == size
    assert select_common_block_size(block, [ours]) == page


def test_what_is_prepared_without_some_layers_is_not_for_all() -> None:
    """The file holds nothing for layers that were skipped: they would be served unprepared, without a word."""
    from sawkv.integrations.vllm.prepare import computation

    def key(*skipped: str) -> Any:
        return computation(
            SimpleNamespace(  # type: ignore[arg-type]
                model_config=SimpleNamespace(
                    hf_config=SimpleNamespace(to_dict=lambda: {"a": 1}), dtype=torch.bfloat16, quantization=None
                ),
                cache_config=SimpleNamespace(kv_cache_dtype_skip_layers=list(skipped)),
                device_config=SimpleNamespace(device_type="cpu"),
            )
        )

    assert key("0") != key()
    assert key("0") != key("1")
    assert key("1", "sliding_window") == key("sliding_window", "1")
