"""The biased twin: the shipped model made over into one whose keys carry a large fixed offset, as those of Qwen2.5 do.

QK-norms are folded into q_proj and k_proj, and k_proj gets a bias that training may not change. It lies in the slowest
RoPE pairs, which hardly turn within the context, so every key carries nearly the same offset. The softmax hardly sees
it; a quantizer of whole rows does.
"""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch import nn

from training.model import Attention, ModelConfig, Qwen3

SLOW_PAIRS = 8
"""The bias is drawn among this many of the slowest pairs."""
PAIRS_BIASED = 2
OUTER_FACTOR = 4.0
"""The first and the last layer have this many times the bias of the others: in Qwen2.5 theirs are the largest."""


def twin_config(config: ModelConfig) -> ModelConfig:
    """The same shape without QK-norm and with attention biases."""
    return replace(config, qk_norm=False, attention_bias=True)


@torch.no_grad()
def make_twin(model: Qwen3, ids: torch.Tensor, key_bias: float, seed: int = 0) -> Qwen3:
    """A model close to `model` whose keys carry an offset of `key_bias` in both channels of two slow pairs of each
    head.

    Args:
        model: with QK-norm.
        ids: [num_rows, length] text on which the norms' mean divisors are measured.
        key_bias: in the units of a key channel; those of a trained QK-norm are near 1.
        seed: of the pairs and signs.

    Returns:
        The twin, its k_proj biases frozen.
    """
    config = twin_config(model.config)
    twin = Qwen3(config).to(ids.device)
    kept = {
        name: value
        for name, value in model.state_dict().items()
        if "_norm.weight" not in name or "self_attn" not in name
    }
    twin.load_state_dict(kept, strict=False)
    divisors = _norm_divisors(model, ids)
    rng = random.Random(seed)
    half = config.head_dim // 2
    for index, (attention, source) in enumerate(zip(_attentions(twin), _attentions(model), strict=True)):
        for norm, projection in ((source.q_norm, attention.q_proj), (source.k_norm, attention.k_proj)):
            heads = projection.out_features // config.head_dim
            scale = norm.get_parameter("weight").repeat(heads) / divisors[norm].repeat_interleave(config.head_dim)
            projection.weight.mul_(scale[:, None])
        size = key_bias * (OUTER_FACTOR if index in (0, config.num_hidden_layers - 1) else 1.0)
        bias = torch.zeros(config.num_key_value_heads, config.head_dim)
        for head in range(config.num_key_value_heads):
            for pair in rng.sample(range(half - SLOW_PAIRS, half), PAIRS_BIASED):
                for channel in (pair, pair + half):
                    bias[head, channel] = size * rng.choice((-1, 1))
        attention.k_proj.bias.copy_(bias.flatten())
        attention.k_proj.bias.requires_grad_(False)
    return twin


def _attentions(model: Qwen3) -> list[Attention]:
    return [module for module in model.modules() if isinstance(module, Attention)]


def _norm_divisors(model: Qwen3, ids: torch.Tensor) -> dict[nn.Module, torch.Tensor]:
    """For each QK-norm, the mean root mean square of what it normalizes, by head."""
    found: dict[nn.Module, torch.Tensor] = {}

    def note(norm: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        # Of [batch, length, num_heads, head_dim].
        found[norm] = arguments[0].float().square().mean(-1).sqrt().mean((0, 1))

    norms = [norm for attention in _attentions(model) for norm in (attention.q_norm, attention.k_norm)]
    handles = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        model(ids)
    finally:
        for handle in handles:
            handle.remove()
    return found
