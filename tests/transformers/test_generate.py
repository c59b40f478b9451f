"""Everything `generate` does, with tiny random models.

The cases are those of Transformers' own generation tests, written anew: its packages do not carry them. Each compares a
SawCache with Transformers' DynamicCache, under a format that loses nothing (rotated fp32 pages), so that any difference
beyond rounding is our error. INT4 is then compared with a simulation that knows nothing of pages (`SimulatedCache`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from sawkv.integrations.transformers import SawCache
from sawkv.integrations.transformers.layer import SawLayer
from tests.transformers.models import MODELS, SimulatedCache, make_model, plain_attention, using

LOSSLESS = "fp32-k16-v16"

PADDED = torch.tensor([[0] * 11 + [1] * 19, [1] * 30, [0] * 3 + [1] * 27])


def prompt(rows: int = 3, tokens: int = 30) -> torch.Tensor:
    return torch.randint(1, 99, (rows, tokens))


def generate(model: PreTrainedModel, cache: Any, ids: torch.Tensor, **options: Any) -> Any:
    settings = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    torch.manual_seed(7)
    return model.generate(ids, **using(cache), **(settings | options))


def both(
    kind: str,
    run: Callable[[PreTrainedModel, Callable[[PreTrainedModel], Any]], Any],
    attention: str = "sawkv",
    **options: Any,
) -> list[Any]:
    """`run(model, new_cache)` with a SawCache, and with a DynamicCache and the model's own attention."""
    ours = run(make_model(kind, attention), lambda model: SawCache(model.config, LOSSLESS, **options))
    theirs = run(make_model(kind, plain_attention(kind)), lambda model: DynamicCache(config=model.config))
    return [ours, theirs]


def assert_same(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    if ours.logits is not None:
        torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("attention", ["sawkv", "own"])
def test_greedy(kind: str, attention: str) -> None:
    ids = prompt()
    name = attention if attention == "sawkv" else plain_attention(kind)
    assert_same(*both(kind, lambda model, cache: generate(model, cache(model), ids), name))


MODES: dict[str, dict[str, Any]] = {
    "sample": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "beams": {"num_beams": 3},
    "beam sample": {"num_beams": 3, "do_sample": True},
    "several of each": {"num_return_sequences": 2, "do_sample": True},
    "several beams of each": {"num_beams": 4, "num_return_sequences": 3},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "one token": {"max_new_tokens": 1},
    "prompt in chunks": {"prefill_chunk_size": 7},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_modes(kind: str, padded: bool, mode: str) -> None:
    ids = prompt()
    mask = PADDED if padded else torch.ones_like(PADDED)
    assert_same(
        *both(kind, lambda model, cache: generate(model, cache(model), ids, attention_mask=mask, **MODES[mode]))
    )


@pytest.mark.parametrize("kind", MODELS)
def test_left_padding_changes_nothing(kind: str) -> None:
    """Each row of a padded batch gives what it gives alone. Padding holds random tokens, to be ignored."""
    ids, model = prompt(), make_model(kind)
    together = generate(model, SawCache(model.config, LOSSLESS), ids, attention_mask=PADDED)
    for row in range(3):
        alone = generate(model, SawCache(model.config, LOSSLESS), ids[row : row + 1, PADDED[row] == 1])
        assert torch.equal(together.sequences[row, 30:], alone.sequences[0, -24:])
        torch.testing.assert_close(
            torch.stack(together.logits)[:, row], torch.stack(alone.logits)[:, 0], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("how", ["assistant", "prompt lookup"])
def test_speculation_changes_nothing(kind: str, how: str) -> None:
    """Drafted tokens are taken back by `crop`, from beyond the window too."""
    ids = torch.randint(1, 99, (1, 6)).repeat(1, 8)  # so that looking up finds something
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 5}
    if how == "assistant":
        options = {"assistant_model": make_model(kind, plain_attention(kind), num_hidden_layers=2, layer_types=None)}
    model = make_model(kind)
    cache = SawCache(model.config, LOSSLESS)
    plain = generate(model, SawCache(model.config, LOSSLESS), ids, max_new_tokens=60)
    fast = generate(model, cache, ids, max_new_tokens=60, **options)
    assert torch.equal(fast.sequences, plain.sequences)
    assert int(cache.get_seq_length()) == 107, "all tokens but the last are in the cache, drafts are not"


@pytest.mark.parametrize("kind", ["qwen3", "mistral"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [None, 100])
def test_a_conversation_goes_on(kind: str, padded: bool, length: int | None) -> None:
    ids, more = prompt(), prompt(3, 9)
    mask = PADDED if padded else torch.ones_like(PADDED)

    def run(model: PreTrainedModel, new_cache: Callable[[PreTrainedModel], Any]) -> Any:
        cache = new_cache(model)
        first = generate(model, cache, ids, attention_mask=mask)
        longer = torch.cat([first.sequences, more], 1)
        longer_mask = torch.cat([mask, mask.new_ones(3, 24 + 9)], 1)
        return generate(model, cache, longer, attention_mask=longer_mask)

    assert_same(*both(kind, run, max_cache_len=length))


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_holes_in_the_mask(kind: str) -> None:
    """A mask that pages cannot show (tokens masked in the middle) is honoured all the same."""
    mask = PADDED.clone()
    mask[:, 15:22] = 0

    def run(model: PreTrainedModel, cache: Callable[[PreTrainedModel], Any]) -> Any:
        return generate(model, cache(model), prompt_ids, attention_mask=mask)

    prompt_ids = prompt()
    assert_same(*both(kind, run))


@pytest.mark.parametrize("kind", ["qwen3", "mistral"])
def test_a_mask_that_changes_its_mind(kind: str) -> None:
    """Tokens that were stored and are masked later."""
    ids, more = prompt(), prompt(3, 4)

    def run(model: PreTrainedModel, new_cache: Callable[[PreTrainedModel], Any]) -> Any:
        cache = new_cache(model)
        with torch.no_grad():
            model(ids, **using(cache))
            return model(more, **using(cache), attention_mask=torch.cat([PADDED, PADDED[:, -4:]], 1)).logits

    torch.testing.assert_close(*both(kind, run), atol=1e-4, rtol=1e-4)


def test_input_embeddings() -> None:
    def run(model: PreTrainedModel, cache: Callable[[PreTrainedModel], Any]) -> Any:
        embeds = model.get_input_embeddings()(ids).detach()
        return generate(model, cache(model), ids, inputs_embeds=embeds)

    ids = prompt()
    assert_same(*both("llama", run))


@pytest.mark.parametrize("lengths", [[30, 1, 1, 1], [1, 1, 1, 1], [3, 8, 9, 2, 40], [17] * 5])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_passes_of_any_length(kind: str, lengths: list[int]) -> None:
    """Short passes read pages, long ones decode them: both continue from any point, and over the edge of the window."""
    pieces = [prompt(2, length) for length in lengths]

    def run(model: PreTrainedModel, new_cache: Callable[[PreTrainedModel], Any]) -> Any:
        cache = new_cache(model)
        with torch.no_grad():
            return torch.cat([model(piece, **using(cache)).logits for piece in pieces], 1)

    torch.testing.assert_close(*both(kind, run), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("attention", ["sawkv", "own"])
def test_int4_equals_its_simulation(kind: str, attention: str) -> None:
    """What attention sees is the quantized K and V: in the prompt, in decoding, padded, with both kinds
    of attention.
    """
    ids = prompt()
    name = attention if attention == "sawkv" else plain_attention(kind)
    ours, theirs = make_model(kind, name), make_model(kind, plain_attention(kind))
    got = generate(ours, SawCache(ours.config, prepare=False), ids, attention_mask=PADDED)
    want = generate(theirs, SimulatedCache(theirs.config, "int4"), ids, attention_mask=PADDED)
    exact = generate(theirs, DynamicCache(config=theirs.config), ids, attention_mask=PADDED)
    first = [x.logits[0] for x in (got, want, exact)]
    # Rounding may flip a code here and there, which moves a logit by hundredths. The quantization itself moves them by
    # tenths.
    assert (first[0] - first[1]).abs().mean() < 0.01
    assert (first[0] - first[2]).abs().mean() > 0.05, "the first token already comes from quantized K and V"
    assert (got.sequences == want.sequences).float().mean() > 0.75


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
@pytest.mark.parametrize("mode", ["padded", "beams", "prompt lookup", "two turns"])
def test_offloaded_pages_are_the_same_pages(kind: str, mode: str) -> None:
    """On a CPU they are copied to and fro all the same."""
    options: dict[str, Any] = {
        "padded": {"attention_mask": PADDED},
        "beams": {"num_beams": 3},
        "prompt lookup": {"prompt_lookup_num_tokens": 7},
        "two turns": {},
    }[mode]
    ids, model = prompt(1 if mode == "prompt lookup" else 3), make_model(kind)
    texts = []
    for offload in (False, True):
        cache = SawCache(model.config, offload=offload)
        text = generate(model, cache, ids, max_new_tokens=150, **options).sequences
        if mode == "two turns":
            text = generate(model, cache, torch.cat([text, ids], 1)).sequences
        texts.append(text)
        assert all((layer.pages is None) == offload for layer in cache.layers)
        assert cache.nbytes > 0
    assert torch.equal(*texts)


@pytest.mark.parametrize("attention", ["sawkv", "sdpa"])
def test_exact_prefill_is_a_choice(attention: str) -> None:
    ids, model, plain = prompt(), make_model("qwen3", attention), make_model("qwen3", "sdpa")
    for tokens, options in ((1, {}), (1, {"max_cache_len": 40}), (5, {}), (9, {"offload": True})):
        cache = SawCache(model.config, exact_prefill=True, prepare=False, **options)
        with torch.no_grad():
            got, want = (each(ids[:, :tokens], **using(held)).logits for each, held in ((model, cache), (plain, None)))
        torch.testing.assert_close(got, want, msg=f"{tokens} tokens, {options}")
    got = generate(model, SawCache(model.config, exact_prefill=True), ids)
    want = generate(plain, None, ids)
    torch.testing.assert_close(got.logits[0], want.logits[0])
    assert not torch.allclose(got.logits[1], want.logits[1], atol=1e-2), "decoding reads quantized K and V"


def test_kernels_equal_the_reference() -> None:
    ids, model = prompt(), make_model("gemma2")
    got, want = (
        generate(model, SawCache(model.config, backend=backend, prepare=False), ids, attention_mask=PADDED)
        for backend in ("cpu", "reference")
    )
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=0.02, rtol=0)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("mode", ["padded", "beams", "prompt lookup"])
def test_decoding_reads_pages(kind: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the prompt is decoded to 16-bit K and V: once a layer."""
    calls = []
    decode = SawLayer.decode
    monkeypatch.setattr(SawLayer, "decode", lambda layer, *dtypes: calls.append(layer) or decode(layer, *dtypes))
    options: dict[str, Any] = {
        "padded": {"attention_mask": PADDED},
        "beams": {"num_beams": 3},
        "prompt lookup": {"prompt_lookup_num_tokens": 7},
    }[mode]
    model = make_model(kind)
    generate(model, SawCache(model.config), prompt(1 if mode == "prompt lookup" else 3), **options)
    assert len(calls) == 4


def test_the_comparison_can_fail() -> None:
    """A cache that stores V in place of K must not pass."""
    model = make_model("llama")
    cache = SawCache(model.config, LOSSLESS)
    layer = cache.layers[1]
    write = layer.write
    layer.write = lambda k, v: write(v, k)
    got, want = generate(model, cache, prompt()), generate(make_model("llama", "sdpa"), None, prompt())
    assert not torch.allclose(torch.stack(got.logits), torch.stack(want.logits), atol=0.05)
