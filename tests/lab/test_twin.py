"""The biased twin: what is frozen, and that Transformers computes what the training code does."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from training.model import ModelConfig, Qwen3
from training.train import load, save
from training.twin import PAIRS_BIASED, SLOW_PAIRS, make_twin

CONFIG = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, head_dim=64)


def test_the_twin_has_a_frozen_offset_in_slow_pairs_and_is_saved_whole(tmp_path: Path) -> None:
    ids = torch.randint(0, 64, (2, 50))
    twin = make_twin(Qwen3(CONFIG), ids, key_bias=5.0)
    for index, layer in enumerate(twin.model.layers):
        bias = layer.self_attn.k_proj.bias
        assert not bias.requires_grad
        pairs = bias.view(2, 2, 32).abs()
        assert torch.equal(pairs[:, 0], pairs[:, 1])
        assert pairs[:, 0].count_nonzero(-1).tolist() == [PAIRS_BIASED] * 2
        assert pairs[..., : 32 - SLOW_PAIRS].count_nonzero() == 0
        assert float(bias.abs().max()) == (20.0 if index in (0, 2) else 5.0)
    assert all(p.requires_grad for name, p in twin.named_parameters() if not name.endswith("k_proj.bias"))
    save(twin, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        want = load(tmp_path)(ids)
        torch.testing.assert_close(loaded(ids).logits, want, rtol=1e-4, atol=1e-5)


def test_folding_the_norms_is_exact_where_they_divide_by_the_same() -> None:
    """With one token all divisors are the mean, and no bias: the twin computes what its model does."""
    model = Qwen3(CONFIG)
    for name, parameter in model.named_parameters():
        if "_norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2)
    ids = torch.randint(0, 64, (1, 1))
    with torch.no_grad():
        torch.testing.assert_close(make_twin(model, ids, key_bias=0.0)(ids), model(ids), rtol=1e-4, atol=1e-5)
