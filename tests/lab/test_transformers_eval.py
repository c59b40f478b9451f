"""The hook: attention reads only what a cache would give back, at every token; and stress changes nothing but keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sawkv import CacheFormat, PagedKVCache, PageLayout, SawkvError, UnsupportedError, append, decode_attention
from sawkv.lab.divergence import Reference, compare_floor, reading_only, score
from sawkv.lab.evaluate import STATES_KEPT, collect_samples
from sawkv.lab.methods import find_method, fit
from sawkv.lab.stress import apply_stress, stressed_pairs
from sawkv.prepare.corpus import preparation_positions
from sawkv.prepare.model import EvalModel, load_tokenizer
from sawkv.prepare.text import load_text
from sawkv.records import AttentionShape
from tests.conftest import MODEL


def small_model(kind: str = "qwen3", **options: object) -> EvalModel:
    """Random weights: two layers, 4 query and 2 KV heads of 64, in fp32."""
    shape = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "initializer_range": 0.2,
    }
    if kind == "gemma2":
        options |= {
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "sliding_window": 8,
            "query_pre_attn_scalar": 64,
        }
    if kind == "gpt_oss":
        options |= {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape | options))
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=2)
    return EvalModel(model)


def logits(model: EvalModel, ids: torch.Tensor) -> torch.Tensor:
    return model.logits(model.hidden(ids))


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma2", "gpt_oss"])
def test_unquantized_it_is_the_model(kind: str) -> None:
    model = small_model(kind)
    assert len(model.layers) == 2
    assert model.shape == AttentionShape(2, 4, 2, 64)
    ids = torch.randint(0, 512, (2, 33))
    got = logits(model, ids)
    with model.eager(), torch.inference_mode():
        torch.testing.assert_close(got, model.model(ids).logits, rtol=1e-4, atol=1e-4)


def test_every_read_is_quantized_the_own_token_included() -> None:
    """One layer's attention equals `decode_attention` of the product over pages that hold the same K and V."""
    model = small_model()
    ids = torch.randint(0, 512, (1, 37))
    taken: list[torch.Tensor] = []
    handle = model.layers[0].o_proj.register_forward_pre_hook(lambda module, arguments: taken.append(arguments[0]))
    states = model.states(ids)[0]
    readers = fit(find_method("int4"), collect_samples(model, ids))
    taken.clear()
    with model.reading(readers):
        model.hidden(ids)
    handle.remove()
    cache = PagedKVCache.allocate(PageLayout(CacheFormat.parse("int4"), 2, 64, 16), 3)
    append(states.k, states.v, cache, torch.arange(37))
    want = decode_attention(
        states.q,
        cache,
        torch.arange(3, dtype=torch.int32)[None],
        torch.tensor([37], dtype=torch.int32),
        torch.tensor([0, 37], dtype=torch.int32),
        softmax_scale=states.softmax_scale,
        max_query_len=37,
        backend="reference",
    )
    torch.testing.assert_close(taken[0].view(37, 4, 64), want, rtol=1e-4, atol=1e-5)


def test_readers_see_all_tokens_of_all_layers_and_go_away() -> None:
    model = small_model()
    ids = torch.randint(0, 512, (3, 20))
    before = logits(model, ids)
    rows_read = []

    def read(rows: torch.Tensor) -> torch.Tensor:
        rows_read.append(rows.shape)
        return torch.zeros_like(rows)

    with model.reading([(read, read)] * 2):
        blind = logits(model, ids)
    assert rows_read == [(20, 2, 64)] * 12  # each sequence by itself, since rows depend on their positions
    assert not torch.allclose(blind, before, atol=0.1)
    torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=0)
    with model.reading(reading_only([(read, read)] * 2, 1)):
        model.hidden(ids)
    assert len(rows_read) == 12 + 6


def test_samples_stand_at_positions_over_the_context() -> None:
    """The first window at its start, the last at its end but for the first tokens; a shorter context, as none, leaves
    all at the start.
    """
    model, ids = small_model(), torch.randint(0, 512, (3, 20))
    samples = collect_samples(model, ids, 200)
    places = preparation_positions(3, 20, 200)
    for i in range(3):
        for sample, states in zip(samples, model.states(ids[i : i + 1], places[i]), strict=True):
            torch.testing.assert_close(sample.k.rows[20 * i : 20 * i + 20], states.k, rtol=0, atol=0)
            torch.testing.assert_close(sample.v.rows[20 * i : 20 * i + 20], states.v, rtol=0, atol=0)
    queries = torch.cat([model.states(ids[i : i + 1], places[i])[0].q for i in range(3)]).view(60, 2, 2, 64)
    torch.testing.assert_close(
        samples[0].k.hessian, torch.einsum("thgd,thgc->hdc", queries, queries) / 120, rtol=1e-4, atol=1e-5
    )
    near, at_start = collect_samples(model, ids, 10), collect_samples(model, ids)
    assert torch.equal(near[1].k.rows, at_start[1].k.rows)
    assert not torch.allclose(samples[1].k.rows, at_start[1].k.rows, atol=0.1)


def test_a_gap_in_positions_hides_no_token() -> None:
    """Transformers would take what follows a gap for another sequence. RoPE alone changes: V of the second layer sees
    the first tokens.
    """
    model, ids = small_model(), torch.randint(0, 512, (1, 20))
    places = preparation_positions(2, 20, 200)[1]
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % 512
    one, two = (model.states(each, places)[1].v[-1] for each in (ids, other))
    assert not torch.allclose(one, two, atol=1e-3)


def test_later_tokens_change_nothing() -> None:
    model = small_model()
    ids = torch.randint(0, 512, (1, 24))
    other = ids.clone()
    other[:, 12:] = torch.randint(0, 512, (1, 12))
    readers = fit(find_method("prepared"), collect_samples(model, ids))
    with model.reading(readers):
        torch.testing.assert_close(logits(model, ids)[:, :12], logits(model, other)[:, :12], rtol=1e-4, atol=1e-4)


def test_one_pass_is_token_by_token() -> None:
    """The trap: caches that quantize only what is read later. Here every prefix gives what the whole pass gives."""
    model = small_model()
    ids = torch.randint(0, 512, (1, 12))
    with model.reading(fit(find_method("int4_plain"), collect_samples(model, ids))):
        whole = logits(model, ids)
        for end in range(1, 13):
            torch.testing.assert_close(logits(model, ids[:, :end])[:, -1], whole[:, end - 1], rtol=1e-4, atol=1e-4)


def test_scores_are_those_of_the_definition() -> None:
    """Against fp64 on whole logits; and in pieces as in one."""
    hidden, other = torch.randn(2, 3, 9, 16)
    head = torch.randn(16, 70_000) / 2
    ids = torch.randint(0, 70_000, (3, 10))
    kl, loss, same = score({"": hidden, "x": other}, ids, lambda states: states @ head)["x"]
    p, q = ((states @ head).double().log_softmax(-1) for states in (hidden, other))
    torch.testing.assert_close(kl.double(), (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.double(), -q.gather(-1, ids[:, 1:, None])[..., 0], rtol=1e-4, atol=1e-5)
    assert torch.equal(same, p.argmax(-1) == q.argmax(-1))


def test_controls_on_the_shipped_model() -> None:
    """FP8 passes and plain INT4 degrades under stress, which a pass that quantizes nothing would not show."""
    model = EvalModel.load(MODEL, "cpu", torch.float32)
    apply_stress(model.layers, 128, 64)
    windows, calibration = load_text(MODEL, None).split(256, 2, 4)
    samples = collect_samples(model, calibration)
    names = ("bf16", "fp8", "int4_plain", "int4-k128-v128")
    reference = Reference(model, windows, 2, STATES_KEPT)
    scores = {name: reference.compare(fit(find_method(name), samples)) for name in names}
    kl = {name: scores[name].divergence().mean_kl for name in names}
    assert reference.scores().divergence().mean_kl == 0
    assert kl["bf16"] < 1e-3
    assert kl["fp8"] < 0.03
    assert kl["int4_plain"] > 0.3
    assert kl["int4_plain"] > 10 * kl["fp8"]
    assert kl["int4-k128-v128"] < kl["int4_plain"] / 2
    parts = scores["fp8"].by_position()
    assert [part.start for part in parts] == [0, 16, 64]
    assert parts[-1].end == 255
    weighted = sum(part.mean_kl * (part.end - part.start) for part in parts) / 255
    assert weighted == pytest.approx(kl["fp8"], rel=1e-5)


def test_the_noise_floor_is_small_and_not_nothing() -> None:
    model, floor = (EvalModel.load(MODEL, "cpu", dtype) for dtype in (torch.float32, torch.bfloat16))
    windows, _ = load_text(MODEL, None).split(64, 2, 1)
    noise = compare_floor(model, floor, windows, step=lambda tokens: None).divergence()
    assert 0 < noise.mean_kl < 0.02


@pytest.mark.parametrize("s", [4, 64])
def test_stress_leaves_bf16_logits_bit_identical(s: int) -> None:
    model = EvalModel.load(MODEL, "cpu", torch.bfloat16)
    ids = load_text(MODEL, None).ids[None, :96]
    before, keys = logits(model, ids), model.states(ids)[0].k
    apply_stress(model.layers, 128, s)
    assert torch.equal(logits(model, ids), before)
    pairs = stressed_pairs(0, 128)
    grown = torch.ones(128)
    grown[[*pairs, *(pair + 64 for pair in pairs)]] = s
    torch.testing.assert_close(model.states(ids)[0].k, keys * grown, rtol=0, atol=0)


def test_stress_of_a_model_without_qk_norm() -> None:
    model = small_model("llama", attention_bias=True)
    for layer in model.layers:
        torch.nn.init.normal_(layer.k_proj.bias)
    model.model.bfloat16()
    ids = torch.randint(0, 512, (1, 20))
    before = logits(model, ids)
    apply_stress(model.layers, 64, 16)
    assert torch.equal(logits(model, ids), before)


def test_gains_undo_stress() -> None:
    """Where the control, centers and feedback without gains, fails, what is prepared is as good as without stress."""
    windows, calibration = load_text(MODEL, None).split(256, 2, 4)
    kl = {}
    for s in (1, 64):
        model = EvalModel.load(MODEL, "cpu", torch.float32)
        apply_stress(model.layers, 128, s)
        samples = collect_samples(model, calibration)
        reference = Reference(model, windows, 2, STATES_KEPT)
        for name in ("prepared", "int4_center_feedback"):
            kl[name, s] = reference.compare(fit(find_method(name), samples)).divergence().mean_kl
    assert kl["prepared", 64] < 1.2 * kl["prepared", 1]
    assert kl["int4_center_feedback", 64] > 5 * kl["prepared", 64]


def test_only_powers_of_two_are_exact() -> None:
    """The control of the two tests above: scaled by 10, the 16-bit model is another."""
    model = small_model("llama").model.bfloat16()
    ids = torch.randint(0, 512, (1, 20))
    with torch.inference_mode():
        before = model(ids).logits
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.mul_(10)
            layer.self_attn.q_proj.weight.div_(10)
        assert not torch.equal(model(ids).logits, before)
    with pytest.raises(UnsupportedError, match="power of two, got 10"):
        apply_stress([], 64, 10)


def test_unfit_models_are_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("bert", vocab_size=99, hidden_size=32, intermediate_size=32, num_attention_heads=2)
    with pytest.raises(UnsupportedError, match="expected a model with causal attention, got BertLMHeadModel, whose"):
        EvalModel(AutoModelForCausalLM.from_config(config))
    with pytest.raises(SawkvError, match="checkpoint directory"):
        EvalModel.load(tmp_path, "cpu", torch.float32)
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    with pytest.raises(SawkvError, match="expected a checkpoint that Transformers loads"):
        EvalModel.load(tmp_path, "cpu", torch.float32)


def test_greedy_continuation_is_that_of_transformers() -> None:
    ids = load_text(MODEL, None).ids[None, :40]
    model = EvalModel.load(MODEL, "cpu", torch.float32)
    want = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).generate(
        ids, max_new_tokens=8, do_sample=False, eos_token_id=-1
    )
    assert torch.equal(model.continue_greedily(ids, 8), want[:, 40:])


def test_a_gguf_file_is_a_checkpoint_too(tmp_path: Path) -> None:
    """Weights, shape and tokenizer of a small Llama, written by the gguf library; nothing is unpacked beside it."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    hidden, layers, heads, kv_heads, vocabulary = 64, 2, 4, 2, 259
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(96)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    words = [chr(256 + i) for i in range(255)]
    writer.add_token_list([*words, words[0] + words[1], *(f"<|{i}|>" for i in range(3))])
    writer.add_token_types([1] * 256 + [3] * 3)
    writer.add_token_merges([f"{words[0]} {words[1]}"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    embedding = torch.randn(vocabulary, hidden)
    writer.add_tensor("token_embd.weight", embedding.numpy())
    writer.add_tensor("output_norm.weight", torch.ones(hidden).numpy())
    sizes = {
        "attn_q": (hidden, hidden),
        "attn_k": (hidden // 2, hidden),
        "attn_v": (hidden // 2, hidden),
        "attn_output": (hidden, hidden),
    }
    sizes |= {"ffn_gate": (96, hidden), "ffn_up": (96, hidden), "ffn_down": (hidden, 96)}
    for layer in range(layers):
        for name, size in sizes.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", (torch.randn(size) / 8).numpy())
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", torch.ones(hidden).numpy())
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    model = EvalModel.load(file, "cpu", torch.float32)
    assert model.shape == AttentionShape(layers, heads, kv_heads, hidden // heads)
    torch.testing.assert_close(model.model.get_input_embeddings().weight, embedding)
    assert bool(logits(model, torch.randint(0, 256, (1, 20))).isfinite().all())
    assert load_tokenizer(file).eos_token_id == 258
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(SawkvError, match="a GGUF file, got"):
        load_tokenizer(tmp_path / "missing.gguf")
