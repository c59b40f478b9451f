# Over 400 lines: one section per kind of misuse of a cache.
"""Uses that caches get wrong: a SawCache serves them right or refuses them by name, with any attention, mode and kind
of cache.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from sawkv import FormatError, LayoutError, UnsupportedError
from sawkv.integrations.transformers import SawCache
from sawkv.integrations.transformers.pages import CROP_MARGIN, Paging
from tests.transformers.models import SMALL, make_model, plain_attention, using

LOSSLESS = "fp32-k16-v16"

KINDS: dict[str, dict[str, Any]] = {
    "growing": {},
    "static": {"max_cache_len": 700},
    "offloaded": {"offload": True},
    "exact prefill": {"exact_prefill": True},
}
"""Of caches."""


def ids(rows: int = 2, tokens: int = 12) -> torch.Tensor:
    return torch.randint(1, 99, (rows, tokens))


def saw(model: PreTrainedModel, **options: Any) -> SawCache:
    return SawCache(model.config, LOSSLESS, **options)


def logits(model: PreTrainedModel, tokens: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        got: torch.Tensor = model(tokens, **using(cache), **options).logits
    return got


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


# Gradients


@pytest.mark.parametrize("cache", KINDS)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("kind", "attention"), [("llama", "sawkv"), ("llama", "sdpa"), ("mistral", "eager"), ("gemma2", "sawkv")]
)
def test_gradients_are_refused(kind: str, attention: str, train: bool, cache: str) -> None:
    model = make_model(kind, attention).train(train)
    held, x = saw(model, **KINDS[cache]), ids()
    with pytest.raises(UnsupportedError, match="no gradients flow"):
        model(x, **using(held)).logits.sum().backward()
    assert held.get_seq_length() == 0
    got, want = logits(model.eval(), x, held), logits(make_model(kind, plain_attention(kind)), x, None)
    assert_close(got, want)
    with pytest.raises(UnsupportedError, match="no gradients flow"):
        model(x[:, :1], **using(held))
    assert int(held.get_seq_length()) == 12, "a refusal changes nothing"


@pytest.mark.parametrize("attention", ["sawkv", "sdpa"])
def test_soft_prompts_of_a_frozen_model_are_refused(attention: str) -> None:
    model = make_model("llama", attention).requires_grad_(False)
    prompt = model.get_input_embeddings()(ids()).requires_grad_()
    with pytest.raises(UnsupportedError, match="no gradients flow"):
        model(inputs_embeds=prompt, **using(saw(model)))
    assert_close(
        model(inputs_embeds=prompt.detach(), **using(saw(model))).logits, model(inputs_embeds=prompt).logits.detach()
    )


@pytest.mark.parametrize("attention", ["sawkv", "sdpa"])
def test_gradients_within_generate_are_refused(attention: str) -> None:
    model = make_model("llama", attention)
    forward = model.forward

    def with_gradients(*args: Any, **kwargs: Any) -> Any:
        with torch.enable_grad():
            return forward(*args, **kwargs)

    with_gradients.__wrapped__ = forward  # type: ignore[attr-defined]  # generate reads the signature
    model.forward = with_gradients
    with pytest.raises(UnsupportedError, match="no gradients flow"):
        model.generate(ids(), **using(saw(model)), max_new_tokens=3)


def test_gradients_of_queries_alone() -> None:
    """Only the last layer's q_proj is trained, so that K and V never require a gradient. Attention over tensors has the
    right one.
    """
    x, grads = ids(), []
    for attention in ("sdpa", "sawkv"):
        model = make_model("llama", attention).requires_grad_(False)
        weight = model.model.layers[-1].self_attn.q_proj.weight.requires_grad_()
        if attention == "sawkv":
            with pytest.raises(UnsupportedError, match="no gradients flow"):
                model(x, **using(saw(model)))
            continue
        for cache in (None, saw(model)):
            (grad,) = torch.autograd.grad(model(x, **using(cache)).logits.square().sum(), weight)
            grads.append(grad)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4, rtol=1e-4)


def test_training_without_a_cache_works_as_ever() -> None:
    x, grads = ids(), []
    for attention in ("sdpa", "sawkv"):
        model = make_model("llama", attention).train()
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(x, use_cache=False).logits.square().sum().backward()
        grads.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    assert torch.equal(*grads)


def test_dropout_of_attention_is_not_lost() -> None:
    """In training mode without gradients (Monte Carlo dropout), steps too."""
    model, x = make_model("llama", attention_dropout=0.5), ids()
    cache = saw(model)
    plain = [logits(model, x, cache), logits(model, x[:, :1], cache)]
    model.train()
    cache = saw(model)
    dropped = [logits(model, x, cache), logits(model, x[:, :1], cache)]
    assert all((a - b).abs().max() > 0.05 for a, b in zip(plain, dropped, strict=True))


# Crops


def crop_both(
    model: PreTrainedModel, keep: int, removed: int | None = None, padding: int = 6, **options: Any
) -> list[torch.Tensor]:
    """Logits after a left-padded prompt of 12 was cropped to `keep`, by rows, with DynamicCache and with SawCache."""
    x, more = ids(), ids(2, 4)
    mask = torch.ones_like(x)
    mask[0, :padding] = 0
    longer = torch.cat([mask[:, :keep], torch.ones(2, 4, dtype=torch.long)], 1)
    places = (longer.cumsum(-1) - 1).clamp(min=0)
    outs = []
    for cache in (DynamicCache(config=model.config), saw(model, **options)):
        logits(model, x, cache, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
        cache.crop(keep - 12 if removed is None else removed)
        steps = []
        for size, step in enumerate(more.split([3, 1], 1)):
            end = keep + 3 + size
            now = {"attention_mask": longer[:, :end], "position_ids": places[:, end - step.shape[1] : end]}
            steps.append(logits(model, step, cache, **now))
        outs.append(torch.cat(steps, 1))
    return outs


@pytest.mark.parametrize("cache", KINDS)
@pytest.mark.parametrize("keep", [0, 1, 3, 5, 6, 9])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_crop_into_left_padding(kind: str, keep: int, cache: str) -> None:
    """Tokens that come where padding was are not padding."""
    want, got = crop_both(make_model(kind), keep, **KINDS[cache])
    assert_close(got, want)


def test_a_crop_into_left_padding_before_the_batch_changes() -> None:
    model = make_model("llama")
    x, mask = ids(3), torch.ones(3, 12, dtype=torch.long)
    mask[0, :6], mask[1, :9] = 0, 0
    outs = []
    for cache in (DynamicCache(config=model.config), saw(model)):
        logits(model, x, cache, attention_mask=mask)
        cache.crop(-7)
        cache.reorder_cache(torch.tensor([1, 0, 2]))
        cache.batch_select_indices(torch.tensor([True, True, False]))
        longer = torch.cat([mask[[1, 0], :5], torch.ones(2, 8, dtype=torch.long)], 1)
        outs.append(logits(model, x[:2, :8], cache, attention_mask=longer, position_ids=torch.arange(8).repeat(2, 1)))
    assert_close(outs[1], outs[0])


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("float_mask", [False, True])
@pytest.mark.parametrize("cache", KINDS)
def test_a_mask_that_shows_padding_is_refused(cache: str, float_mask: bool, tokens: int) -> None:
    """Padding was not stored: what such a mask wants to see is gone. A refusal changes nothing."""
    model, x = make_model("llama"), ids()
    mask = torch.ones_like(x)
    mask[0, :6] = 0
    held = saw(model, **KINDS[cache])
    logits(model, x, held, attention_mask=mask)
    shown = torch.cat([mask, torch.ones(2, tokens, dtype=torch.long)], 1)
    shown[0, 3] = 1
    more = ids(2, tokens)
    if float_mask:
        static = 700 if cache == "static" and tokens == 1 else 12 + tokens
        full = torch.zeros(2, 1, tokens, static, dtype=torch.bool)
        full[..., : 12 + tokens] = shown[:, None, None].bool() & torch.ones(tokens, 12 + tokens).tril(12).bool()
        shown = torch.where(full, 0.0, torch.finfo(torch.float32).min)
    with pytest.raises(LayoutError, match="hides left padding"):
        logits(model, more, held, attention_mask=shown)
    assert int(held.get_seq_length()) == 12
    right = torch.cat([mask, torch.ones(2, tokens, dtype=torch.long)], 1)
    theirs = DynamicCache(config=model.config)
    logits(model, x, theirs, attention_mask=mask)
    assert_close(*(logits(model, more, each, attention_mask=right)[1:] for each in (held, theirs)))


def windowed(**options: Any) -> tuple[PreTrainedModel, SawCache]:
    """A model whose first layer is a full one, and a cache of 305 tokens that has let go of those before the window."""
    model = make_model("gemma3_text", layer_types=["full_attention", "sliding_attention"] * 2)
    cache, x = saw(model, **options), ids(1, 305)
    for piece in x.split([304, 1], 1):
        logits(model, piece, cache)
    return model, cache


@pytest.mark.parametrize("options", [{}, {"offload": True}])
@pytest.mark.parametrize("tokens", [-300, 5])
def test_a_refused_crop_has_cropped_nothing(tokens: int, options: dict[str, Any]) -> None:
    model, cache = windowed(**options)
    other = copy.deepcopy(cache)
    with pytest.raises(LayoutError, match="activate_past_recording"):
        cache.crop(tokens)
    assert [cache.get_seq_length(i) for i in range(4)] == [305] * 4
    more = ids(1, 9)
    assert torch.equal(logits(model, more, cache), logits(model, more, other))
    cache.crop(-CROP_MARGIN)
    assert [cache.get_seq_length(i) for i in range(4)] == [305 + 9 - CROP_MARGIN] * 4


# Passes that die


class Died(Exception):
    pass


def die_in(model: PreTrainedModel, layer: int) -> Any:
    """Let the next pass die after this layer's attention."""

    def die(*args: Any) -> None:
        raise Died

    return model.model.layers[layer].mlp.register_forward_pre_hook(die)


@pytest.mark.parametrize("cache", KINDS)
@pytest.mark.parametrize("tokens", [1, 6, 30])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize(("kind", "attention"), [("llama", "sawkv"), ("llama", "sdpa"), ("gemma2", "sawkv")])
def test_a_pass_that_dies_between_layers(kind: str, attention: str, layer: int, tokens: int, cache: str) -> None:
    """It is noticed by whatever comes next, and can be taken back."""
    model, x, more = make_model(kind, attention), ids(2, 12), ids(2, tokens)
    held, theirs = saw(model, **KINDS[cache]), DynamicCache(config=model.config)
    mask = torch.ones_like(x)
    mask[0, :5] = 0
    for each in (held, theirs):
        logits(model, x, each, attention_mask=mask)
    hook = die_in(model, layer)
    longer = torch.cat([mask, torch.ones_like(more)], 1)
    with pytest.raises(Died):
        logits(model, more, held, attention_mask=longer)
    hook.remove()
    for use in (
        lambda: logits(model, more, held),
        lambda: held.crop(1 - tokens),
        lambda: held.reorder_cache(torch.tensor([1, 0])),
        lambda: held.batch_repeat_interleave(2),
        lambda: held.batch_select_indices(torch.tensor([0])),
        lambda: held.layers[0].keys,
    ):
        with pytest.raises(LayoutError, match=rf"ended in {layer + 1} of 4 layers.*crop\({-tokens}\)"):
            use()
    held.crop(-tokens)
    assert int(held.get_seq_length()) == 12
    assert_close(logits(model, more, held, attention_mask=longer), logits(model, more, theirs, attention_mask=longer))


@pytest.mark.parametrize("cache", KINDS)
def test_a_first_pass_that_dies(cache: str) -> None:
    """Layers that it did not reach do not know of its tokens."""
    model, x = make_model("llama"), ids()
    for cropped in (True, False):
        held = saw(model, **KINDS[cache])
        hook = die_in(model, 1)
        with pytest.raises(Died):
            logits(model, x, held)
        hook.remove()
        with pytest.raises(LayoutError, match=r"expected layer 2 once in each forward pass.*reset"):
            logits(model, x, held)
        held.crop(-int(held.get_seq_length())) if cropped else held.reset()
        assert_close(logits(model, x, held), logits(model, x, None))


@pytest.mark.parametrize("options", [{}, {"offload": True}])
def test_a_long_pass_that_dies_over_a_window_can_only_be_forgotten(options: dict[str, Any]) -> None:
    model = make_model("gemma3_text")
    cache, x = saw(model, **options), ids(1, 30)
    logits(model, x, cache)
    hook = die_in(model, 2)
    with pytest.raises(Died):
        logits(model, ids(1, 500), cache)
    hook.remove()
    with pytest.raises(LayoutError, match=r"activate_past_recording"):
        cache.crop(-500)
    with pytest.raises(LayoutError, match=r"ended in 3 of 4 layers"):
        logits(model, x, cache)
    cache.reset()
    assert_close(logits(model, x, cache), logits(model, x, None))


@pytest.mark.parametrize("where", ["append", "Attention.__call__", "gather"])
def test_a_kernel_that_fails(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make_model("llama"), ids()
    held = saw(model)
    logits(model, x, held)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError

    more = ids(2, 20 if where == "gather" else 2)
    with monkeypatch.context() as patched:
        patched.setattr(f"sawkv.ops.{where}", fail)
        with pytest.raises(torch.OutOfMemoryError):
            logits(model, more, held)
    with pytest.raises(LayoutError, match="ended in 0 of 4 layers"):
        logits(model, more, held)
    held.crop(-more.shape[1])
    assert_close(logits(model, more, held), logits(model, torch.cat([x, more], 1), None)[:, 12:])


@pytest.mark.parametrize("cache", KINDS)
def test_a_change_of_the_batch_that_dies(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make_model("llama"), ids()
    held = saw(model, **KINDS[cache])
    logits(model, x, held)

    def fail(index: torch.Tensor) -> None:
        raise Died

    with monkeypatch.context() as patched:
        patched.setattr(held.layers[2], "reorder_cache", fail)
        with pytest.raises(Died):
            held.batch_repeat_interleave(3)
    for use in (
        lambda: logits(model, x, held),
        lambda: held.crop(-1),
        lambda: held.reorder_cache(torch.tensor([0])),
        lambda: list(held),
    ):
        with pytest.raises(LayoutError, match=r"change of the batch stopped half way.*reset"):
            use()
    held.reset()
    assert_close(logits(model, x, held), logits(model, x, None))


@pytest.mark.parametrize("index", [[], [2], [0, -3]])
def test_a_refused_change_of_the_batch_has_changed_nothing(index: list[int]) -> None:
    model, x = make_model("llama"), ids()
    held = saw(model)
    logits(model, x, held)
    for operation in (held.reorder_cache, held.batch_select_indices):
        with pytest.raises(LayoutError, match="expected sequences from 0 to 1"):
            operation(torch.tensor(index, dtype=torch.long))
    with pytest.raises(LayoutError, match="a bool for each of 2"):
        held.batch_select_indices(torch.tensor([True, False, True]))
    held.batch_select_indices(torch.tensor([-1, 0]))
    assert_close(logits(model, x[[1, 0]], held), logits(model, torch.cat([x, x], 1)[[1, 0]], None)[:, 12:])


def test_layers_that_get_unlike_tokens() -> None:
    cache = SawCache(make_model("llama", "sdpa").config, LOSSLESS)
    k = torch.randn(2, 2, 5, 16)
    cache.update(k, k, 0)
    with pytest.raises(LayoutError, match="expected 5 new tokens in layer 1, as in the layers before, got 3"):
        cache.update(k[:, :, :3], k[:, :, :3], 1)
    for layer in (1, 2, 3):
        cache.update(k, k, layer)
    with pytest.raises(LayoutError, match="expected layer 3 once in each forward pass"):
        cache.update(k, k, 3)
    cache.update(k, k, 0)


# Tensors of other kinds


@pytest.mark.parametrize("cache", KINDS)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("attention", ["sawkv", "sdpa", "eager"])
def test_autocast(attention: str, kind: str, cache: str) -> None:
    """K comes in fp32 from rotary embeddings, V in bf16 from a projection."""
    x, outs = ids(), []
    for name in (attention, plain_attention(kind)):
        model = make_model(kind, name)
        held = saw(model, **KINDS[cache]) if not outs else DynamicCache(config=model.config)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outs.append(torch.cat([logits(model, piece, held) for piece in x.split([9, 1, 2], 1)], 1))
    torch.testing.assert_close(outs[0], outs[1], atol=0.1, rtol=0.06)


@pytest.mark.parametrize("attention", ["sawkv", "sdpa"])
def test_autocast_that_comes_and_goes(attention: str) -> None:
    model, x = make_model("llama", attention), ids()
    held = saw(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits(model, x, held)
    got = logits(model, x, held)
    torch.testing.assert_close(got, logits(model, torch.cat([x, x], 1), None)[:, 12:], atol=0.06, rtol=0.06)
    model.generate(torch.cat([x, x, x[:, :1]], 1), **using(held), max_new_tokens=3)


def test_update_gives_each_its_dtype_and_takes_any_strides() -> None:
    cache, theirs = SawCache(make_model("llama", "sdpa").config, LOSSLESS), DynamicCache()
    for tokens in (5, 1, 3):
        k = torch.randn(2, 2, 16, tokens).transpose(2, 3)
        v = torch.randn(2, 2, tokens, 32).bfloat16()[..., ::2]
        for layer in range(4):
            for got, want, x in zip(cache.update(k, v, layer), theirs.update(k, v, layer), (k, v), strict=True):
                assert got.dtype == x.dtype
                torch.testing.assert_close(got, want.to(x.dtype))


@pytest.mark.parametrize("attention", ["sawkv", "sdpa"])
@pytest.mark.parametrize("cache", KINDS)
def test_no_tokens(cache: str, attention: str) -> None:
    """A pass of no tokens, first and between others."""
    k = [torch.randn(2, 2, tokens, 16) for tokens in (0, 5, 0, 1)]
    held, theirs = SawCache(make_model("llama", "sdpa").config, LOSSLESS, **KINDS[cache]), DynamicCache()
    for x in k:
        for layer in range(4):
            for got, want in zip(held.update(x, x, layer), theirs.update(x, x, layer), strict=True):
                torch.testing.assert_close(got, want)


BAD_STATES: dict[str, tuple[Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], str]] = {
    "unlike shapes": (lambda x: (x, x[..., :8]), r"K and V of one shape, got \[2, 2, 5, 16\] and \[2, 2, 5, 8\]"),
    "no data": (lambda x: (x.to("meta"), x.to("meta")), "with data, on one device, got meta"),
    "two devices": (lambda x: (x, x.to("meta")), "with data, on one device, got cpu and meta"),
    "fp64": (lambda x: (x.double(), x.double()), "bfloat16, float16 or float32, got torch.float64"),
    "integers": (lambda x: (x.int(), x.int()), "bfloat16, float16 or float32, got torch.int32"),
    "no sequences": (lambda x: (x[:0], x[:0]), "at least one sequence, got a batch of 0"),
}


@pytest.mark.parametrize("what", BAD_STATES)
@pytest.mark.parametrize("cache", KINDS)
def test_states_that_are_refused(cache: str, what: str) -> None:
    """In a first pass and in a later one. A refusal changes nothing."""
    make, message = BAD_STATES[what]
    held, x = SawCache(make_model("llama", "sdpa").config, LOSSLESS, **KINDS[cache]), torch.randn(2, 2, 5, 16)
    for length in (0, 5):
        with pytest.raises((UnsupportedError, LayoutError), match=message):
            held.update(*make(x), 0)
        assert int(held.get_seq_length()) == length
        for layer in range(4):
            held.update(x, x, layer)
    torch.testing.assert_close(held.layers[3].keys, torch.cat([x, x], 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cache", KINDS)
@pytest.mark.parametrize(("attention", "kind"), [("sawkv", "llama"), ("sdpa", "llama"), ("eager", "gemma2")])
def test_another_batch_or_too_many_tokens(attention: str, kind: str, cache: str) -> None:
    model, x = make_model(kind, attention), ids()
    held = saw(model, **KINDS[cache])
    logits(model, x, held)
    for wrong in (x[:1], ids(3)):
        with pytest.raises(LayoutError, match=f"expected 2 sequences on cpu, as before, got {len(wrong)}"):
            logits(model, wrong, held)
    states = [torch.randn(2, 4, 1, 16)] * 2
    with pytest.raises(LayoutError, match=r"expected 2 KV heads of \d+ channels in layer 0, as before, got 4 of 16"):
        held.layers[0].enter(*states)
    if cache == "static":
        with pytest.raises(LayoutError, match="at most max_cache_len=700 tokens, got 12 and 689 more"):
            logits(model, ids(2, 689), held)
    assert int(held.get_seq_length()) == 12
    assert_close(
        logits(model, x, held), logits(make_model(kind, plain_attention(kind)), torch.cat([x, x], 1), None)[:, 12:]
    )


# Models of other kinds


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("bloom", {"n_head": 4, "n_layer": 2, "hidden_size": 64}), ("doge", {}), ("diffllama", {}), ("jetmoe", {})],
)
def test_models_that_touch_k_and_v(kind: str, changes: dict[str, Any]) -> None:
    """They are refused with our attention by a message that names the model and the way out, and that way is right."""
    if kind == "jetmoe":
        changes = {"kv_channels": 16, "num_key_value_heads": 4, "num_experts_per_tok": 2, "num_local_experts": 4}
    config = AutoConfig.for_model(kind, **(SMALL | changes))
    x, outs = ids(), []
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    for cache in (SawCache(model.config, "fp32"), DynamicCache(config=model.config)):
        outs.append(torch.cat([logits(model, piece, cache) for piece in x.split([9, 1, 2], 1)], 1))
    assert_close(*outs)
    model.config._attn_implementation = "sawkv"
    with pytest.raises(UnsupportedError, match=rf'{kind}.*set_attn_implementation\("eager"\)'):
        logits(model, x, SawCache(model.config, "fp32"))


@pytest.mark.parametrize("attention", ["sawkv", "sdpa"])
@pytest.mark.parametrize("shared", [0, 2])
def test_layers_that_differ_in_their_heads_or_share_k_and_v(shared: int, attention: str) -> None:
    """Gemma 4: heads and head_dim depend on the layer's type, and its config says so for each layer alone. The last
    layers may read the pages of earlier ones, also where these drop what is behind a window.
    """
    kinds = ["sliding_attention", "full_attention"] * 2
    shape = {
        "hidden_size": 64,
        "layer_types": kinds,
        "sliding_window": 20,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
    }
    off = {
        "num_kv_shared_layers": shared,
        "hidden_size_per_layer_input": 8 * shared,
        "vocab_size_per_layer_input": 100,
        "attention_k_eq_v": True,
        "enable_moe_block": False,
    }
    config = AutoConfig.for_model("gemma4_text", **(SMALL | shape | off))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    pieces, outs, cache = ids(2, 469).split([30, 424, 1, 5, 9], 1), [], saw(model)
    for held in (cache, saw(model, offload=True), DynamicCache(config=model.config)):
        outs.append(torch.cat([logits(model, piece, held) for piece in pieces], 1))
    assert_close(outs[0], outs[2])
    assert_close(outs[1], outs[2])
    last, ends = saw(model), torch.tensor([29, 453, 454, 459, 468])  # where `generate` looks
    outs.append(torch.cat([logits(model, piece, last, logits_to_keep=1) for piece in pieces], 1))
    assert_close(outs[3], outs[2][:, ends])
    assert len(cache.layers) == 4 - shared
    cache.crop(-9)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert_close(logits(model, pieces[-1].flip(0), cache), outs[0][:, -9:].flip(0))
    if shared:
        with pytest.raises(UnsupportedError, match=r"max_cache_len for a gemma4_text: .* share K and V"):
            SawCache(config, max_cache_len=64)
    config = AutoConfig.for_model("gemma4_text", **(SMALL | shape | off | {"head_dim": 24}))
    with pytest.raises(FormatError, match="head_dim: expected a multiple of 16 from 16 to 256, or 512, got 24"):
        SawCache(config)


def test_attention_weights_from_eager_attention() -> None:
    model, x = make_model("llama", "eager"), ids()
    with torch.no_grad():
        got, want = (model(x, **using(cache), output_attentions=True).attentions for cache in (saw(model), None))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


# Tools that measure a cache


@pytest.mark.parametrize("cache", KINDS)
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_layers_show_what_attention_sees(kind: str, cache: str) -> None:
    model, x = make_model(kind, "sdpa"), ids(2, 40)
    held, theirs = saw(model, **KINDS[cache]), DynamicCache(config=model.config)
    assert all(layer.keys is None and layer.values is None for layer in held.layers)
    for piece in x.split([33, 1, 6], 1):
        for each in (held, theirs):
            logits(model, piece, each)
        for ours, reference in zip(held, theirs, strict=True):
            for got, want in zip(ours[:2], reference[:2], strict=True):
                torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
            assert (ours[2] is None) == (kind != "mistral")
    if kind == "llama":
        assert_close(logits(model, x[:, :3], DynamicCache(held)), logits(model, x[:, :3], copy.deepcopy(theirs)))
    assert held.nbytes == sum(layer.nbytes for layer in held.layers)
    with torch.inference_mode():
        assert held.layers[0].keys.shape == theirs.layers[0].keys.shape
    assert_close(logits(model, x[:, :3], held), logits(model, torch.cat([x, x[:, :3]], 1), None)[:, 40:])


def test_quantized_layers_show_quantized_numbers() -> None:
    config = make_model("llama", "sdpa").config
    held, k = SawCache(config, prepare=False), torch.randn(2, 2, 50, 16)
    for layer in range(4):
        want, _ = held.update(k, k, layer)
    assert torch.equal(held.layers[3].keys, want)
    assert not torch.equal(held.layers[3].keys, k)


def test_gradients_of_sinks_alone_are_refused() -> None:
    """All else is frozen, so that Q, K and V of the last layer never require one; its attention reads pages."""
    model = make_model("gpt_oss").requires_grad_(False)
    model.model.layers[-1].self_attn.sinks.requires_grad_()
    for tokens in (4, 12):
        with pytest.raises(UnsupportedError, match="no gradients flow"):
            model(ids(2, tokens), **using(saw(model)))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # PyTorch's own formulas use it
@pytest.mark.parametrize("attention", ["sawkv", "eager"])
def test_differentiation_by_transforms_is_refused(attention: str) -> None:
    """Forward-mode tangents, torch.func and vmap, also without autograd."""
    model, x = make_model("llama", attention), ids(2, 4)
    embedded = model.get_input_embeddings()(x).detach()
    weights = dict(model.named_parameters())

    def run(inputs: torch.Tensor, held: Any) -> torch.Tensor:
        out: torch.Tensor = model(inputs_embeds=inputs, **using(held)).logits
        return out

    held = saw(model)
    with torch.no_grad():
        with (
            forward_ad.dual_level(),
            pytest.raises(UnsupportedError, match="got those of forward-mode differentiation"),
        ):
            run(forward_ad.make_dual(embedded, torch.ones_like(embedded)), held)
        with pytest.raises(UnsupportedError, match="expected K and V with data, got Tensor"):
            torch.func.vmap(lambda inputs: run(inputs, held))(embedded[None])
    with pytest.raises(UnsupportedError, match="no gradients flow"):
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,), using(held)).logits.sum())(weights)
    assert_close(logits(model, x, held), logits(make_model("llama", "sdpa"), x, None))


@pytest.mark.parametrize("attention", ["sawkv", "sdpa"])
@pytest.mark.parametrize("cache", KINDS)
def test_a_first_allocation_that_fails(cache: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call may be made again, when there is room."""
    model, x = make_model("llama", attention), ids()
    held = saw(model, **KINDS[cache])

    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr("sawkv.integrations.transformers.layer.PagedKVCache.allocate", fail)
        with pytest.raises(torch.OutOfMemoryError):
            logits(model, x, held)
    assert_close(logits(model, x, held), logits(model, x, None))


@pytest.mark.parametrize("cache", KINDS)
@pytest.mark.parametrize(("where", "what"), [("_find_padding", "begin"), ("advance", "begin"), ("crop", "a crop")])
def test_a_change_of_lengths_that_stops_half_way(
    where: str, what: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C can come anywhere. Tables that do not fit the pages would have kernels write past them."""
    model, x = make_model("llama"), ids()
    held = saw(model, **KINDS[cache])
    if where != "_find_padding":
        logits(model, x, held)
    before = getattr(Paging, where)

    def stop(self: Paging, *args: Any) -> None:
        before(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Paging, where, stop)
        with pytest.raises(KeyboardInterrupt):
            held.crop(-3) if where == "crop" else logits(model, x, held)
    for use in (lambda: logits(model, x, held), lambda: held.crop(-1), lambda: held.batch_repeat_interleave(2)):
        with pytest.raises(LayoutError, match=rf"{what}.* stopped half way.*reset"):
            use()
    held.reset()
    assert_close(logits(model, x, held), logits(model, x, None))


@pytest.mark.parametrize("cache", KINDS)
def test_batch_changes_in_one_mode_and_another(cache: str) -> None:
    """What inference mode makes cannot be written outside of it."""
    model, x = make_model("llama"), ids(4)
    held = saw(model, **KINDS[cache])
    with torch.inference_mode():
        logits(model, x, held)
        held.batch_repeat_interleave(2)
    for index in ([1, 0, 3, 2, 5, 4, 7, 6], [0, 2, 4]):
        held.reorder_cache(torch.tensor(index))
    picked = x.repeat_interleave(2, 0)[[1, 3, 5]]
    assert_close(logits(model, picked, held), logits(model, picked.repeat(1, 2), None)[:, 12:])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("attention", ["sawkv", "sdpa"])
def test_what_records_a_model_is_refused(attention: str) -> None:
    """A record of kernels' results would give them for any input."""
    model, x = make_model("llama", attention).requires_grad_(False), ids()
    held = saw(model)
    logits(model, x, held)
    mask = torch.ones(12, 24, dtype=torch.bool).tril(12).expand(2, 1, 12, 24)

    def run(tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = model(tokens, attention_mask=mask, **using(held)).logits
        return out

    for record in (lambda: torch.jit.trace(run, (x,), check_trace=False), lambda: make_fx(run)(x)):
        with torch.no_grad(), pytest.raises(UnsupportedError, match=r"torch.jit.trace or torch.fx records"):
            record()
    assert_close(logits(model, x, held), logits(make_model("llama", "sdpa"), torch.cat([x, x], 1), None)[:, 12:])


def test_layers_that_are_not_there_and_moves_that_are_not_ours() -> None:
    model, x = make_model("llama", "sdpa"), ids()
    held = SawCache(make_model("llama", "sdpa", num_hidden_layers=2).config, LOSSLESS)
    with pytest.raises(UnsupportedError, match=r"expected layers 0 to 1, as the config says, got layer 2"):
        logits(model, x, held)
    held = saw(model)
    logits(model, x, held)
    for call in (held.layers[0].offload, held.layers[0].prefetch, lambda: held.offload(0)):
        with pytest.raises(UnsupportedError, match=r"SawCache\(model, offload=True\) moves its pages by itself"):
            call()
    assert_close(logits(model, x, held), logits(model, torch.cat([x, x], 1), None)[:, 12:])


def test_indices_of_other_types() -> None:
    model, x = make_model("llama"), ids()
    held = saw(model)
    logits(model, x, held)
    for wrong in (torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]]), torch.tensor(0)):
        with pytest.raises(LayoutError, match="expected a vector of indices"):
            held.reorder_cache(wrong)
    with pytest.raises(LayoutError, match=r"crop: expected a whole number, got 1\.5"):
        held.crop(1.5)  # type: ignore[arg-type]
    held.batch_select_indices([1, 0])  # type: ignore[arg-type]  # as DynamicCache
    held.reorder_cache(torch.tensor([1, 0], dtype=torch.uint8))
    assert_close(logits(model, x, held), logits(model, torch.cat([x, x], 1), None)[:, 12:])


@pytest.mark.parametrize("other", [None, "models/none", {}])
def test_what_is_no_model_is_named(other: Any) -> None:
    with pytest.raises(UnsupportedError, match="expected a model of Transformers or its config, got"):
        SawCache(other)


# Any order of calls


@pytest.mark.parametrize("cache", KINDS)
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_any_order_of_calls(kind: str, cache: str) -> None:
    """Passes with padding and holes, deaths, crops, changes of the batch, copies and changes of mode, against no cache
    at all.
    """
    changes = {"num_experts_per_tok": 4} if kind == "gpt_oss" else {}  # no expert is chosen by rounding
    plain = make_model(kind, plain_attention(kind), **changes)
    for _ in range(4):
        model = make_model(kind, random.choice(["sawkv", "eager"]), **changes)
        held, tokens, mask = (
            saw(model, **KINDS[cache]),
            torch.zeros(2, 0, dtype=torch.long),
            torch.zeros(2, 0, dtype=torch.long),
        )
        said = []
        for _ in range(12):
            operation = (
                random.choice(["pass"] * 4 + ["die", "crop", "batch", "copy", "record"]) if tokens.numel() else "pass"
            )
            mode = random.choice([torch.no_grad, torch.inference_mode])
            said.append(f"{operation} {mode.__name__}")
            if operation in ("pass", "die"):
                new = ids(len(tokens), random.choice([1, 1, 2, 7, 9, 25]))
                shown = torch.ones_like(new)
                if not tokens.numel():
                    shown[0, : random.randrange(new.shape[1])] = 0
                elif random.random() < 0.2:
                    shown[-1, : random.randrange(new.shape[1])] = 0
                longer, seen = torch.cat([tokens, new], 1), torch.cat([mask, shown], 1)
                places = (seen.cumsum(-1) - 1).clamp(min=0)
                given = {"attention_mask": seen, "position_ids": places[:, -new.shape[1] :]}
                if operation == "die":
                    hook = die_in(model, random.randrange(4))
                    with mode(), pytest.raises(Died):
                        model(new, **using(held), **given)
                    hook.remove()
                    held.crop(-new.shape[1])
                    continue
                with mode():
                    got = model(new, **using(held), **given).logits
                want = logits(plain, longer, None, attention_mask=seen, position_ids=places)[:, -new.shape[1] :]
                torch.testing.assert_close(got[shown.bool()], want[shown.bool()], atol=2e-3, rtol=2e-3)
                tokens, mask = longer, seen
            elif operation == "crop":
                removed = random.choice([1, 4, tokens.shape[1], random.randrange(tokens.shape[1] + 3)])
                try:
                    held.crop(-removed)
                except LayoutError:  # a window has let go of what would be seen again
                    assert kind != "llama", said
                    continue
                kept = max(0, tokens.shape[1] - removed)
                tokens, mask = tokens[:, :kept], mask[:, :kept]
            elif operation == "batch":
                index = torch.randint(0, len(tokens), (random.randint(1, 3),))
                with mode():
                    held.batch_select_indices(index)
                tokens, mask = tokens[index], mask[index]
            elif operation == "copy":
                held = copy.deepcopy(held)
            else:
                held.layers[0].activate_past_recording()
            assert {int(held.get_seq_length(i)) for i in range(4)} == {tokens.shape[1]}, said
