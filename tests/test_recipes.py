"""The recipes of CONTRIBUTING.md, followed to the letter: a toy codec and a toy backend, by these steps alone."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from sawkv import CacheFormat, PagedKVCache, PageLayout, UnsupportedError, append, decode_attention, gather, kernels
from sawkv.format import spec
from sawkv.format.codecs import CODECS
from sawkv.kernels import reference


class HalvesCodec:
    """Multiples of 1/2 from -64 on, a byte each."""

    def encode(self, y: torch.Tensor, feedback: None = None) -> tuple[torch.Tensor, None]:
        return ((y * 2).round() + 128).clamp(0, 255).to(torch.uint8), None

    def decode(self, codes: torch.Tensor, meta: torch.Tensor | None) -> torch.Tensor:
        return (codes.float() - 128) / 2


@pytest.fixture
def layout(monkeypatch: pytest.MonkeyPatch) -> PageLayout:
    """Of the recipe "A new method": its bits, and its instance."""
    monkeypatch.setitem(spec.CODEC_BITS, "toy8", 8)
    monkeypatch.setitem(CODECS, "toy8", HalvesCodec())
    return PageLayout(CacheFormat.parse("toy8-k64-v64"), 2, 64, 16)


def read_back(cache: PagedKVCache, backend: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """What was appended, and what `gather` gives of it."""
    x = 3 * torch.randn(2, 20, 2, 64)
    append(x[0], x[1], cache, torch.arange(20), backend=backend)
    out = torch.empty_like(x)
    table, length = torch.arange(2, dtype=torch.int32)[None], torch.tensor([20], dtype=torch.int32)
    gather(
        cache, table, length, torch.tensor([0, 20], dtype=torch.int32), out[0], out[1], rotated=False, backend=backend
    )
    return x, out


def test_a_new_codec_is_served_by_the_reference_and_refused_by_name_elsewhere(layout: PageLayout) -> None:
    x, out = read_back(PagedKVCache.allocate(layout, 2))
    assert (x - out).norm() / x.norm() < 0.1
    assert not torch.equal(x, out), "the control: it rounds"
    for name in ("cpu", "triton", "cuda"):
        with pytest.raises(UnsupportedError, match=r"toy8|NVIDIA GPU"):
            read_back(PagedKVCache.allocate(layout, 2), name)
    with pytest.raises(UnsupportedError, match=r"cpu: expected int4, int3, int2, .*, fp32, got toy8"):
        read_back(PagedKVCache.allocate(layout, 2), "cpu")


def test_a_new_backend_is_chosen_and_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the recipe "A new kernel backend": a module with a name, `counts`, `unsupported_reason` and three classes."""
    calls: list[str] = []

    class Pages(reference.Pages):
        def append(
            self, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor, positions: torch.Tensor | None
        ) -> None:
            calls.append("append")
            super().append(k, v, slot_mapping, positions)

    toy = ModuleType("sawkv.kernels.toy")
    parts = {
        "Pages": Pages,
        "Schedule": kernels.Schedule,
        "Attention": reference.Attention,
        "name": "toy",
        "counts": False,
    }
    vars(toy).update(
        parts, unsupported_reason=lambda device, layout: None if layout.head_dim == 64 else "expected head_dim 64"
    )
    monkeypatch.setitem(sys.modules, "sawkv.kernels.toy", toy)
    monkeypatch.setattr(kernels, "PREFERENCE", ("toy", *kernels.PREFERENCE))
    kernels.select_backend.cache_clear()
    try:
        cache = PagedKVCache.allocate(PageLayout(CacheFormat.parse("fp32"), 2, 64, 16), 2)
        x, out = read_back(cache)
        assert calls == ["append"]
        assert torch.equal(x, out)
        one = torch.tensor([20], dtype=torch.int32)
        where = torch.arange(2, dtype=torch.int32)[None], one, torch.tensor([0, 1], dtype=torch.int32)
        q = torch.randn(1, 4, 64)
        got = decode_attention(q, cache, *where, softmax_scale=0.125, max_query_len=1)
        assert torch.equal(
            got, decode_attention(q, cache, *where, softmax_scale=0.125, max_query_len=1, backend="reference")
        )
        with pytest.raises(UnsupportedError, match="toy: expected head_dim 64"):
            kernels.select_backend(torch.device("cpu"), PageLayout(CacheFormat("int4"), 2, 128, 16), "toy")
    finally:
        kernels.select_backend.cache_clear()
