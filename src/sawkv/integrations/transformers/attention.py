"""The attention function `sawkv`: writes new K and V to pages, then reads the pages, or decodes them for PyTorch's
attention.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sawkv.errors import UnsupportedError
from sawkv.integrations.transformers.cache import CACHES
from sawkv.integrations.transformers.layer import UNCOMPILED, SawLayer
from sawkv.integrations.transformers.models import NAME
from sawkv.integrations.transformers.prepare import note
from sawkv.integrations.transformers.states import NewStates, refuse_gradients

MAX_SCORES = 1 << 26
"""Scores that attention with a soft-cap or sinks computes at once, where PyTorch has no kernel for it."""


def register() -> None:
    """Register `attn_implementation="sawkv"` with Transformers."""
    AttentionInterface.register(NAME, saw_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


class Call(NamedTuple):
    """The arguments of `saw_attention` but K and V: a model's layer, its queries, and how they attend."""

    module: torch.nn.Module
    query: torch.Tensor
    mask: torch.Tensor | None
    scale: float
    dropout: float
    softcap: float | None
    sinks: torch.Tensor | None
    others: dict[str, Any]


def saw_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | NewStates,
    value: torch.Tensor | NewStates,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention, as Transformers' models call it.

    Args:
        query: [batch_size, num_q_heads, num_new, head_dim].
        key, value: `NewStates` of a SawCache; or tensors [batch_size, num_kv_heads, num_keys, head_dim], without a
            cache or with another cache.
        attention_mask: [batch_size or 1, 1, num_new, num_keys], bool or added to scores; None is causal.
        softcap: soft-cap of scores.
        s_aux: [num_q_heads] sinks.

    Returns:
        [batch_size, num_new, num_q_heads, head_dim], and None in place of weights.

    Raises:
        UnsupportedError: attention weights are asked for; or, with a SawCache, attention is not causal, has a position
            bias, or needs gradients.
    """
    if kwargs.get("output_attentions"):
        raise UnsupportedError(
            'sawkv: attention weights are never whole. Expected attn_implementation="eager" for output_attentions'
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = Call(module, query, attention_mask, scale, dropout, softcap, s_aux, kwargs)
    if not isinstance(key, NewStates):
        assert isinstance(value, torch.Tensor)
        if not torch.compiler.is_compiling():
            note(module, query, key, value, scale)
        return attend_tensors(call, key, value), None
    refuse_gradients(query, key.key, key.value, s_aux)
    if not kwargs.get("is_causal", getattr(module, "is_causal", True)) or kwargs.get("position_bias") is not None:
        raise UnsupportedError(f"sawkv: expected causal attention without position bias, got {type(module).__name__}")
    if not torch.compiler.is_compiling():
        return attend(call, key), None
    if key.layer.is_compileable and query.shape[2] == 1 and not dropout:
        mask = attention_mask if key.layer.is_first else None
        return attend_compiled(
            query, key.key, key.value, mask, s_aux, key.handle, key.layer.index, scale, softcap or 0.0
        ), None
    return attend_uncompiled(call, key), None


def attend(call: Call, new: NewStates) -> torch.Tensor:
    """Write new K and V, unless an earlier layer wrote them, and attend. Result as of `saw_attention`."""
    layer, paging = new.layer, new.layer.paging
    reader, num_new = layer.reader(call.module), call.query.shape[2]
    with paging.on_device():
        if reader == layer.index:
            layer.enter(new.key, new.value, None if call.dropout else call.query.shape[1], call.mask)
            layer.write(new.key, new.value)
        # Layers that share K and V may be asked for the last of the new tokens alone (Transformers from 5.24 on).
        if paging.reads_pages and not layer.exact and num_new == new.key.shape[2]:
            out = layer.attend(call.query, call.scale, call.softcap or 0.0, call.sinks)
        else:
            keys, values = (new.key, new.value) if layer.exact else layer.decode(new.key.dtype, new.value.dtype)
            out = attend_tensors(call._replace(mask=paging.cut_mask(call.mask, num_new)), keys, values)
        if reader == layer.last_reader:  # those that share these pages need all that the first of them read
            layer.settle()
    return out


attend_uncompiled = torch.compiler.disable(attend, reason=UNCOMPILED)  # type: ignore[no-untyped-call]


@torch.library.custom_op("sawkv::attend", mutates_args=())
def attend_compiled(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    handle: int,
    layer_idx: int,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """One decoding step of one layer inside a compiled graph. It changes only the cache, which the graph does not see.

    Layers keep their order, because each needs the output of the one before. CUDA graphs may capture it: everything
    that is kept has a fixed address, and nothing depends on lengths on the host.
    """
    layer = CACHES[handle].layers[layer_idx]
    assert isinstance(layer, SawLayer)
    with layer.paging.on_device():
        layer.enter_compiled(key, value, query.shape[1], mask)
        layer.write(key, value)
        out = layer.attend(query, scale, softcap, sinks)
        layer.settle()
    return out


@attend_compiled.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    handle: int,
    layer_idx: int,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])


def attend_tensors(call: Call, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention over K and V as tensors. Result as of `saw_attention`."""
    module, query, mask, scale, dropout, softcap, sinks, others = call
    if not softcap and sinks is None:
        out: torch.Tensor = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scale, **others
        )[0]
        return out
    group = query.shape[1] // key.shape[1]
    num_new, num_keys = query.shape[2], key.shape[2]
    grouped = query.reshape(query.shape[0], key.shape[1], group, num_new, -1)
    if mask is None and getattr(module, "is_causal", True):
        mask = torch.ones(num_new, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_new)[None, None]
    rows = max(1, MAX_SCORES // (query.shape[0] * query.shape[1] * num_keys))
    parts = []
    for start in range(0, num_new, rows):
        scores = torch.einsum("bhgqd,bhkd->bhgqk", grouped[..., start : start + rows, :], key).float() * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            part = mask[:, :, None, start : start + rows]
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
        if sinks is not None:
            scores = torch.cat([scores, sinks.float().view(1, -1, group, 1, 1).expand(*scores.shape[:-1], 1)], -1)
        # A row of padding sees nothing.
        weights = torch.softmax(scores, -1).nan_to_num(0.0)[..., :num_keys].to(query.dtype)
        weights = torch.nn.functional.dropout(weights, dropout, module.training)
        parts.append(torch.einsum("bhgqk,bhkd->bqhgd", weights, value))
    return torch.cat(parts, 1).flatten(2, 3)
