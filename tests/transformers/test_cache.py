# Over 400 lines: one cache's operations, memory, calibrations and refusals.
"""The cache itself: its operations, its memory, what it refuses."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, DynamicCache

from sawkv import (
    CacheFormat,
    LayoutError,
    PagedKVCache,
    PageLayout,
    SawkvError,
    append,
    ops,
)
from sawkv.errors import CalibrationError
from sawkv.format.constants import BUCKET_SIZE
from sawkv.format.feedback import takes_from
from sawkv.integrations.transformers import SawCache
from sawkv.integrations.transformers.pages import CROP_MARGIN
from sawkv.integrations.transformers.prepare import warn_once
from sawkv.prepare.calibration import Calibration, LayerCalibration, model_id
from tests.transformers.models import SMALL, make_model, plain_attention, using

LOSSLESS = "fp32-k16-v16"


def states(batch: int, tokens: int) -> list[torch.Tensor]:
    return [torch.randn(batch, 2, tokens, 16) for _ in range(2)]


def pair(kind: str = "llama", **options: Any) -> tuple[SawCache, DynamicCache]:
    """A SawCache and a DynamicCache, both as tensors: the model's attention is not ours."""
    config = make_model(kind, plain_attention(kind)).config
    return SawCache(config, LOSSLESS, **options), DynamicCache(config=config)


def update_both(caches: tuple[SawCache, DynamicCache], batch: int, tokens: int) -> None:
    """One pass of all layers; what `update` returns must agree."""
    for layer in range(4):
        k, v = states(batch, tokens)
        for got, want in zip(*(cache.update(k, v, layer) for cache in caches), strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert caches[0].get_seq_length() == caches[1].get_seq_length()
    for layer in range(4):
        assert caches[0].get_mask_sizes(1, layer) == caches[1].get_mask_sizes(1, layer)
        assert caches[0].get_mask_sizes(6, layer) == caches[1].get_mask_sizes(6, layer)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_update_returns_what_transformers_does(kind: str) -> None:
    caches = pair(kind)
    for tokens in (50, 1, 1, 30, 1, 700, 1, 1, 19):
        update_both(caches, 2, tokens)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_batch_operations(kind: str, offload: bool) -> None:
    caches = pair(kind, offload=offload)
    update_both(caches, 3, 45)
    for operation, argument in (
        ("reorder_cache", torch.tensor([2, 2, 0])),
        ("batch_repeat_interleave", 2),
        ("batch_select_indices", torch.tensor([0, 1, 5, 3])),
        ("batch_select_indices", torch.tensor([True, False, True, True])),
        ("reorder_cache", torch.tensor([1, 0, 2])),
    ):
        for cache in caches:
            getattr(cache, operation)(argument)
        batch = caches[1].layers[0].keys.shape[0]
        assert caches[0].layers[0].batch_size == batch
        update_both(caches, batch, 3)


def test_crop() -> None:
    caches = pair()
    update_both(caches, 2, 45)
    for count in (-1, -20, -3):
        for cache in caches:
            cache.crop(count)
        caches[0].crop(0)
        update_both(caches, 2, 2)
    length = caches[0].get_seq_length()
    caches[0].crop(5)  # how Transformers before 5.18 says it
    assert caches[0].get_seq_length() == 5
    caches[0].crop(-length)
    assert caches[0].get_seq_length() == 0


def test_a_window_keeps_what_a_crop_may_need() -> None:
    caches = pair("mistral")
    if not hasattr(caches[1], "activate_past_recording"):
        pytest.skip("Transformers before 5.8 does not draft with windows")
    for cache in caches:
        cache.activate_past_recording()
    update_both(caches, 2, 200)
    for _ in range(3):
        for cache in caches:
            cache.crop(0)
        update_both(caches, 2, CROP_MARGIN + 40)
        for cache in caches:
            cache.crop(-CROP_MARGIN - 30)
        update_both(caches, 2, 5)
        for cache in caches:
            cache.crop(0)


def test_a_window_refuses_a_crop_that_it_cannot_undo() -> None:
    cache, _ = pair("mistral")
    for _ in range(300):
        for layer in range(4):
            cache.update(*states(1, 1), layer)
    cache.crop(-CROP_MARGIN)
    with pytest.raises(LayoutError, match="activate_past_recording"):
        cache.crop(-200)


def test_reset_and_early_initialization() -> None:
    caches = pair("gemma2")
    update_both(caches, 3, 45)
    for cache in caches:
        cache.reset()
    assert caches[0].get_seq_length() == 0
    assert not caches[0].is_initialized
    for cache in caches:
        cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    assert caches[0].is_initialized
    update_both(caches, 2, 7)


def test_copies_are_apart() -> None:
    """As for a prompt that several conversations begin with."""
    model = make_model("qwen3")
    cache, ids = SawCache(model.config, LOSSLESS), torch.randint(1, 99, (1, 20))
    with torch.no_grad():
        model(ids, **using(cache))
        wanted = [model(torch.cat([ids, ids[:, :count]], 1)).logits[:, -1] for count in (3, 5)]
        copies = [copy.deepcopy(cache) for _ in wanted]
        for other, count, want in zip(copies, (3, 5), wanted, strict=True):
            torch.testing.assert_close(model(ids[:, :count], **using(other)).logits[:, -1], want, atol=1e-4, rtol=1e-4)
    assert cache.get_seq_length() == 20
    assert copies[0].settings.config is model.config
    assert len({cache.handle, *(other.handle for other in copies)}) == 3


def test_decoding_never_reads_what_was_not_written() -> None:
    """All bytes of fresh pages are poison: NaN scales."""
    model, ids = make_model("gemma2"), torch.randint(1, 99, (2, 30))
    cache = SawCache(model.config)
    for layer in cache.layers:
        hold = layer.hold

        def poisoned(first: int, count: int, layer: Any = layer, hold: Any = hold) -> None:
            before = layer.pages
            if before is None:
                hold(first, count)
                layer.pages.pages.fill_(0xFF)
                return
            hold(first, count)
            if layer.pages is not before:
                fresh = layer.pages.pages.view(count, -1)
                kept = max(0, layer.paging.length // 16 - first)
                fresh[kept + 1 :].fill_(0xFF)

        layer.hold = poisoned
    out = model.generate(ids, **using(cache), max_new_tokens=300, output_logits=True, return_dict_in_generate=True)
    assert torch.stack(out.logits).isfinite().all()


@pytest.mark.parametrize("static", [False, True])
def test_memory_is_what_the_format_says(static: bool) -> None:
    model, ids = make_model("qwen3", head_dim=128, dtype="bfloat16").bfloat16(), torch.randint(1, 99, (2, 2000))
    cache, theirs = SawCache(model.config, max_cache_len=2033 if static else None), DynamicCache(config=model.config)
    for each in (cache, theirs):
        model.generate(ids, **using(each), max_new_tokens=34)
    wide = sum(layer.keys.nbytes + layer.values.nbytes for layer in theirs.layers)
    assert cache.nbytes >= 2 * 4 * 2 * 2033 * 136, "2 sequences, 4 layers, 2 KV heads, 136 bytes"
    assert wide / cache.nbytes > 3.5


def test_a_window_holds_no_more_than_it_needs() -> None:
    model = make_model("gemma2")
    cache, ids = SawCache(model.config), torch.randint(1, 99, (1, 1500))
    with torch.no_grad():
        model(ids, **using(cache))
    held = [layer.pages.pages.shape[0] * 16 for layer in cache.layers]
    assert held[1] >= 1500
    assert held[0] < 20 + CROP_MARGIN + 200, "already after the prompt"
    model.generate(torch.cat([ids, ids[:, :1]], 1), **using(cache), max_new_tokens=150)
    assert max(layer.pages.pages.shape[0] * 16 for layer in cache.layers[::2]) < 20 + CROP_MARGIN + 200


@pytest.mark.parametrize("options", [{}, {"max_cache_len": 200}, {"offload": True}])
def test_inference_mode_comes_and_goes(options: dict[str, Any]) -> None:
    """A prompt in inference mode, text without it, beams within it again."""
    model, ids = make_model("gemma2"), torch.randint(1, 99, (2, 20))
    cache = SawCache(model.config, LOSSLESS, **options)
    with torch.inference_mode():
        model(ids[:, :-1], **using(cache))
        cache.reorder_cache(torch.tensor([1, 0]))
    with torch.no_grad():
        longer = model.generate(ids.flip(0), **using(cache), max_new_tokens=100, num_beams=1)
        assert torch.equal(longer, make_model("gemma2", "eager").generate(ids.flip(0), max_new_tokens=100))
        cache.reorder_cache(torch.tensor([1, 0]))
    with torch.inference_mode():
        got = model(ids[:, :1], **using(cache)).logits
        want = model(torch.cat([longer.flip(0)[:, :-1], ids[:, :1]], 1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


def test_two_caches_of_one_model() -> None:
    model = make_model("mistral")
    ids = [torch.randint(1, 99, (2, 25)), torch.randint(1, 99, (3, 60))]
    apart = [SawCache(model.config, LOSSLESS) for _ in ids]
    with torch.no_grad():
        alone = [
            [model(x, **using(cache)).logits, model(x[:, :1], **using(cache)).logits]
            for x, cache in zip(ids, apart, strict=True)
        ]
        mixed = [SawCache(model.config, LOSSLESS) for _ in ids]
        first = [model(x, **using(cache)).logits for x, cache in zip(ids, mixed, strict=True)]
        second = [model(x[:, :1], **using(cache)).logits for x, cache in zip(ids, mixed, strict=True)]
    for i in range(2):
        assert torch.equal(first[i], alone[i][0])
        assert torch.equal(second[i], alone[i][1])


def test_the_attention_without_a_saw_cache() -> None:
    """`attn_implementation="sawkv"` with other caches, or none, is PyTorch's attention."""
    for kind in ("llama", "mistral", "gemma2"):
        ids, own = torch.randint(1, 99, (2, 40)), "eager" if kind == "gemma2" else "sdpa"
        for options in ({"use_cache": False}, {}, {"cache_implementation": "static", "disable_compile": True}):
            got, want = (make_model(kind, name).generate(ids, max_new_tokens=5, **options) for name in ("sawkv", own))
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("deepseek_v3", {}, "multi-head latent attention"),
        ("mamba", {}, "layers of type|causal self-attention"),
        ("t5", {}, "encoder"),
        ("llama", {"head_dim": 24}, "head_dim: expected a multiple of 16"),
        ("llama4_text", {}, "layers of type chunked_attention"),
    ],
)
def test_models_that_cannot_be_served_are_refused_at_once(kind: str, changes: dict[str, Any], message: str) -> None:
    config = AutoConfig.for_model(kind, **((SMALL | changes) if kind == "llama" else {}))
    with pytest.raises(SawkvError, match=message):
        SawCache(config)


@pytest.mark.parametrize("attention", ["sawkv", "sdpa"])
def test_calibration(attention: str, tmp_path: Path) -> None:
    """Centers cost nothing under a format that loses nothing, and are kept through all that moves pages."""
    model, ids = make_model("qwen3", attention), torch.randint(1, 99, (2, 20))
    centers = torch.randn(2, 4, 2, 16)
    for name in (LOSSLESS, "int4-k16-v16"):
        Calibration(CacheFormat.parse(name), model_id(model.config), *centers).save(tmp_path / name)
    with torch.no_grad():
        cache = SawCache(model.config, LOSSLESS, calibration=tmp_path / LOSSLESS)
        model(ids, **using(cache))
        cache.reorder_cache(torch.tensor([1, 0]))
        more = torch.randint(1, 99, (2, 300))
        got = [model(more, **using(cache)).logits, model(ids[:, :1], **using(cache)).logits]
        whole = model(torch.cat([ids.flip(0), more, ids[:, :1]], 1), use_cache=False).logits
        torch.testing.assert_close(torch.cat(got, 1), whole[:, 20:], atol=1e-3, rtol=1e-3)
        with pytest.raises(CalibrationError, match="format: expected fp32-k16-v16"):
            model(ids, **using(SawCache(model.config, LOSSLESS, calibration=tmp_path / "int4-k16-v16")))
        plain, centered = (SawCache(model.config, calibration=c) for c in (None, tmp_path / "int4-k16-v16"))
        for each in (plain, centered):
            model(ids, **using(each))
        assert not torch.equal(plain.layers[0].pages.pages, centered.layers[0].pages.pages)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_centers_and_gains_where_attention_has_a_soft_cap_or_sinks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They change nothing in a format that loses nothing: logits are those of the model's own attention in fp32,
    without a cache.
    """
    model, ids = make_model(kind), torch.randint(1, 99, (2, 60))
    shape = (4, 2, model.config.head_dim)
    gains = {name: 0.5 + torch.rand(shape) for name in ("k_gain", "v_gain")}
    made = Calibration(
        CacheFormat.parse(LOSSLESS), model_id(model.config), torch.randn(shape), torch.randn(shape), **gains
    )

    def logits() -> torch.Tensor:
        cache = SawCache(model.config, LOSSLESS, calibration=made)
        return torch.cat([model(part, **using(cache)).logits for part in ids.split([45, 1, 6, 1, 7], 1)], 1)

    with torch.no_grad():
        want = make_model(kind, "eager")(ids, use_cache=False).logits
        torch.testing.assert_close(logits(), want, atol=1e-3, rtol=1e-3)
        attention = ops.attention

        def lose_center(cache: PagedKVCache, **options: Any) -> ops.Attention:
            return attention(replace(cache, k_center=None), **options)

        monkeypatch.setattr(ops, "attention", lose_center)
        assert (logits() - want).abs().max() > 0.05, "the control: a cap and sinks do see the center"


@pytest.mark.parametrize(("kind", "attention"), [("llama", "sawkv"), ("gemma3_text", "sdpa")])
def test_centers_of_buckets_change_no_logit(kind: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32-bit pages: with left padding, across the border of a bucket in prompts and single tokens, after a crop back
    over it, and after the batch is reordered.
    """
    model = make_model(kind, attention, max_position_embeddings=4 * BUCKET_SIZE)
    length, pads = BUCKET_SIZE + 30, 6
    ids, other = torch.randint(1, 99, (2, length)), torch.randint(1, 99, (2, 40))
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    places = (mask.cumsum(1) - 1).clamp_min(0)
    shape = 4, 2, model.config.head_dim
    k_center = 3 * torch.randn(shape[0], 3, *shape[1:])
    made = Calibration(CacheFormat.parse(LOSSLESS), model_id(model.config), k_center, torch.randn(shape))

    def logits(ids: torch.Tensor, cache: SawCache | None, parts: list[int], past: int = 0) -> torch.Tensor:
        found = []
        for part in parts:
            now = slice(past, past + part)
            inputs = {"attention_mask": mask[:, : now.stop], "position_ids": places[:, now]}
            kept = {"use_cache": False} if cache is None else using(cache)
            found.append(model(ids[:, now], **inputs, **kept).logits)
            past += part
        return torch.cat(found, 1)

    def check(parts: list[int]) -> bool:
        cache = SawCache(model.config, LOSSLESS, calibration=made)
        got = [logits(ids, cache, parts)]
        want = [logits(ids, None, [length])]
        if kind == "llama":
            cache.crop(-40)
            changed = torch.cat([ids[:, :-40], other], 1)
            got.append(logits(changed, cache, [9, 1, 1, 29], length - 40))
            want.append(logits(changed, None, [length])[:, -40:])
            cache.reorder_cache(torch.tensor([0, 0]))
            assert torch.equal(*cache.layers[1].states()[0])
        seen = mask.bool()
        error = max(float((a - b)[seen[:, -b.shape[1] :]].abs().max()) for a, b in zip(got, want, strict=True))
        return error < 1e-3

    with torch.no_grad():
        assert check([BUCKET_SIZE - 2, 1, 1, 1, 4, 1, 1, 1, 1, 1, 2, 18])
        append = ops.append

        def misplaced(k: Any, v: Any, pages: Any, slots: Any, positions: torch.Tensor, **options: Any) -> None:
            append(k, v, pages, slots, positions + 1, **options)

        monkeypatch.setattr(ops, "append", misplaced)
        assert not check([length]), "the control: one token stands in the wrong bucket"


def test_tokens_behind_the_last_center_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("llama", "sawkv", max_position_embeddings=4 * BUCKET_SIZE)
    ids, shape = torch.randint(1, 99, (1, 2 * BUCKET_SIZE)), (4, 2, model.config.head_dim)
    made = Calibration(
        CacheFormat.parse(LOSSLESS), model_id(model.config), torch.randn(4, 2, *shape[1:]), torch.randn(shape)
    )

    def said() -> int:
        return sum(f"centers for {2 * BUCKET_SIZE} positions, and" in message for message in caplog.messages)

    warn_once.cache_clear()
    cache = SawCache(model.config, LOSSLESS, calibration=made)
    with torch.no_grad():
        for new, times in ((ids, 0), (ids[:, :1], 1), (ids[:, :1], 1)):
            model(new, **using(cache))
            assert said() == times
        for max_cache_len, times in ((2 * BUCKET_SIZE, 1), (2 * BUCKET_SIZE + 1, 2)):  # steps may be compiled
            warn_once.cache_clear()
            model(ids[:, :4], **using(SawCache(model.config, LOSSLESS, calibration=made, max_cache_len=max_cache_len)))
            assert said() == times


@pytest.mark.parametrize("offload", [False, True])
def test_feedback_is_in_the_bytes_and_kept(offload: bool) -> None:
    """Pages of each layer as the reference writes them, with that layer's weights, before and after the batch is
    reordered.
    """
    config = make_model("llama", "sdpa").config
    weights = torch.randint(-127, 128, (2, 4, 2, 16, 16), dtype=torch.int8) * takes_from(16).to(torch.int8)
    step = torch.full((4, 2), 1e-3)
    cache_format = CacheFormat.parse("int4-k16-v16")
    fed_back = {"k_feedback": weights[0], "k_feedback_step": step, "v_feedback": weights[1], "v_feedback_step": step}
    made = Calibration(cache_format, model_id(config), *torch.randn(2, 4, 2, 16), **fed_back)
    cache = SawCache(config, cache_format, calibration=made, offload=offload)
    layout = PageLayout(cache_format, 2, 16, 16)
    written = [[states(2, tokens) for _ in range(4)] for tokens in (32, 16)]
    for i, layers in enumerate(written):
        for layer, (k, v) in enumerate(layers):
            cache.update(k, v, layer)
        if i == 0:
            cache.reorder_cache(torch.tensor([1, 0]))
    for layer, (before, after) in enumerate(zip(*written, strict=True)):
        wanted = [
            PagedKVCache.allocate(layout, 3, **given.constants()) for given in (made.layer(layer), LayerCalibration())
        ]
        for each in wanted:
            rows = [torch.cat([old[1], new[0]], 1).transpose(0, 1) for old, new in zip(before, after, strict=True)]
            append(*rows, each, torch.arange(48), backend="reference")
        cache.layers[layer]._fetch()
        held = cache.layers[layer].pages
        got = held.pages.unflatten(0, (-1, 2))[:3, 0]  # pages of the first sequence
        assert torch.equal(got, wanted[0].pages)
        assert not torch.equal(got, wanted[1].pages)
        assert held.fingerprint() == wanted[0].fingerprint()
