"""On a GPU: `python -m pytest -m gpu tests/transformers`.

The same texts from GPU and CPU, from compiled and uncompiled steps, from one device and two.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from sawkv.integrations.transformers import SawCache
from tests.transformers.models import make_model, plain_attention, using
from tests.transformers.test_generate import PADDED, generate, prompt

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

KINDS = ["qwen3", "mistral", "gemma2"]


def on_gpu(kind: str, attention: str = "sawkv", **changes: Any) -> PreTrainedModel:
    """head_dim 128 or more, as the CUDA kernels need 64."""
    # type: ignore[no-any-return]
    return make_model(kind, attention, **({} if kind == "gemma2" else {"head_dim": 128}) | changes).cuda()


def assert_close(got: Any, want: Any, limit: float = 0.05) -> None:
    """First-step logits agree, and most tokens: rounding flips a code, and a near-tie, here and there."""
    assert (got.logits[0].cpu() - want.logits[0].cpu()).abs().mean() < limit
    assert (got.sequences.cpu() == want.sequences.cpu()).float().mean() > 0.7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_gpu_equals_cpu(kind: str, padded: bool) -> None:
    ids, mask = prompt(), PADDED if padded else torch.ones_like(PADDED)
    model = on_gpu(kind)
    got = generate(model, SawCache(model.config), ids.cuda(), attention_mask=mask.cuda())
    model = model.cpu()
    assert_close(got, generate(model, SawCache(model.config), ids, attention_mask=mask))


@pytest.mark.parametrize(("kind", "padded"), [("qwen3", True), ("gemma2", False)])
def test_compiled_steps_equal_uncompiled_ones(kind: str, padded: bool) -> None:
    """By `generate`'s own choice: inductor with CUDA graphs. Twice with one cache, then with a second one."""
    torch.compiler.reset()
    ids, mask = prompt().cuda(), (PADDED if padded else torch.ones_like(PADDED)).cuda()
    model = on_gpu(kind)
    want = generate(model, SawCache(model.config), ids, attention_mask=mask)
    cache = SawCache(model.config, max_cache_len=80)
    for turn in range(3):
        if turn == 2:
            cache = SawCache(model.config, max_cache_len=80)
        got = generate(model, cache, ids, attention_mask=mask)
        assert_close(got, want)
        assert int(cache.get_seq_length()) == 53
        cache.reset()


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True}, {"prompt_lookup_num_tokens": 7}])
@pytest.mark.parametrize("kind", KINDS)
def test_modes_lose_nothing_to_their_own_cache(kind: str, options: dict[str, Any]) -> None:
    """Under rotated fp32 pages, which the Triton or reference kernels read."""
    ids = prompt(1 if "prompt_lookup_num_tokens" in options else 3).cuda()
    ours, theirs = on_gpu(kind), on_gpu(kind, plain_attention(kind))
    got = generate(ours, SawCache(ours.config, "fp32-k16-v16"), ids, **options)
    want = generate(theirs, DynamicCache(config=theirs.config), ids, **options)
    assert_close(got, want, 0.01)


def test_layers_on_two_devices() -> None:
    """As `device_map` spreads them: some layers on the CPU, some on the GPU, each with its own pages."""
    model, ids = on_gpu("gemma2"), prompt().cuda()
    want = generate(model, SawCache(model.config), ids, attention_mask=PADDED.cuda())

    def to(device: torch.device) -> Any:
        def move(module: Any, args: Any, kwargs: Any) -> Any:
            moved = {
                name: value.to(device)
                if isinstance(value, torch.Tensor)
                else tuple(x.to(device) for x in value)
                if isinstance(value, tuple)
                else value
                for name, value in kwargs.items()
            }
            return tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in args), moved

        return move

    for index, layer in enumerate(model.model.layers):
        device = torch.device("cpu" if index >= 2 else "cuda:0")
        layer.to(device).register_forward_pre_hook(to(device), with_kwargs=True)
    model.model.norm.register_forward_pre_hook(to(torch.device("cuda:0")), with_kwargs=True)
    cache = SawCache(model.config)
    got = generate(model, cache, ids, attention_mask=PADDED.cuda())
    assert_close(got, want)
    assert {layer.pages.pages.device.type for layer in cache.layers} == {"cpu", "cuda"}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_offloaded_pages_are_the_same_pages(options: dict[str, Any]) -> None:
    model, ids = on_gpu("gemma2"), prompt().cuda()
    texts = [
        generate(model, SawCache(model.config, offload=offload), ids, max_new_tokens=200, **options)
        for offload in (False, True)
    ]
    assert_close(texts[1], texts[0], 0.01)


@pytest.mark.parametrize("offload", [False, True])
def test_a_decoding_step_never_waits_for_the_gpu(offload: bool) -> None:
    """Of our own accord: the step's work is enqueued, and the host goes on."""
    model, ids = on_gpu("qwen3"), prompt().cuda()
    cache = SawCache(model.config, offload=offload)
    with torch.no_grad():
        model(ids, **using(cache))
        for _ in range(2):  # the first makes the plan and loads kernels
            model(ids[:, :1], **using(cache))
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(ids[:, :1], **using(cache))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_memory_of_a_step() -> None:
    """No 16-bit K and V: a step over 16k tokens allocates little beside the pages."""
    model = on_gpu("qwen3", num_hidden_layers=2, max_position_embeddings=20000).bfloat16()
    cache, ids = SawCache(model.config), torch.randint(1, 99, (1, 16000)).cuda()
    with torch.no_grad():
        model(ids, logits_to_keep=1, **using(cache))
        for _ in range(2):
            model(ids[:, :1], **using(cache))
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(ids[:, :1], **using(cache))
    one_layer_in_16_bits = 16000 * 2 * 2 * 128 * 2
    assert torch.cuda.max_memory_allocated() - before < one_layer_in_16_bits / 4
    assert cache.nbytes < 1.1 * 2 * 16000 * 2 * 136
