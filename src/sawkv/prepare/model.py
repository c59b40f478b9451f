"""A Transformers model whose attention reads K and V through given functions, in one teacher-forced pass.

The attention function is registered through Transformers' AttentionInterface. It gets K (after RoPE) and V of every
token, the query's own token included, replaces them by what a cache would return, and attends causally as `sdpa` does.
Transformers' own quantized caches return unquantized states in such a pass, so they cannot be used to measure
perplexity. Over 400 lines: one class and its hooks.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from sawkv.checkpoint import check_weights, parse_config, wrong_sizes
from sawkv.errors import SawkvError, UnsupportedError
from sawkv.files import reason
from sawkv.prepare.corpus import passes, preparation_positions
from sawkv.prepare.states import Kept, LayerReaders, LayerStates, Reader
from sawkv.prepare.statistics import LayerStatistics
from sawkv.prepare.turning import bucketed_context
from sawkv.records import AttentionShape

ATTENTION = "sawkv_eval"
_HOOK = "_sawkv_eval_hook"


def find_device(name: str | None = None) -> torch.device:
    """The device called `cpu` or `cuda`. Without a name, a GPU if there is one.

    Raises:
        UnsupportedError: the name is another, or PyTorch finds no GPU.
    """
    has_gpu = torch.cuda.is_available()
    if name not in (None, "cpu", "cuda"):
        raise UnsupportedError(f"device: expected cpu or cuda, got {name!r}")
    if name == "cuda" and not has_gpu:
        raise UnsupportedError("device: expected a GPU for cuda, got a PyTorch that sees none")
    return torch.device(name or ("cuda" if has_gpu else "cpu"))


def default_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU, as engines run models. fp32 on a CPU, where bf16 is often slow, and where rounding of the model
    would hide the cache's error.
    """
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_tokenizer(checkpoint: Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory or GGUF file."""
    with _readable(checkpoint) as source:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(**source)
    return tokenizer


def load_model(checkpoint: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint directory or GGUF file, on the CPU. No code of the checkpoint is run, and nothing is
    downloaded.

    Raises:
        SawkvError: Transformers cannot load the checkpoint.
    """
    with _readable(checkpoint) as source:
        if "gguf_file" in source:
            from transformers import GgufConfig  # the oldest Transformers lacks it

            source["quantization_config"] = GgufConfig(dequantize=True)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype, local_files_only=True)
    return model


class EvalModel:
    """A causal language model with hooks in its attention layers.

    Args:
        model: on its device and in its dtype. Its attention implementation is replaced, and not restored.

    Raises:
        UnsupportedError: its attention does not go through Transformers' AttentionInterface.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        AttentionInterface.register(ATTENTION, _attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        self.model = model
        self.model.train(False)
        self.model.set_attn_implementation(ATTENTION)
        self.layers: list[nn.Module] = []
        """The modules that attend, first to last."""
        self.heads: list[tuple[int, int]] = []
        """KV heads and head_dim of each."""
        self.shape = self._find_layers()
        self._head = self._plain_head()

    @classmethod
    def load(cls, checkpoint: Path, device: torch.device | str, dtype: torch.dtype) -> EvalModel:
        """Load a checkpoint directory or GGUF file, as `load_model` does."""
        return cls(load_model(checkpoint, dtype).to(device))  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def max_positions(self) -> int:
        """Most tokens that the model can read: as many as it has learned positions for. RoPE takes any number."""
        config = self.model.config.get_text_config()
        learned = None if getattr(config, "rope_parameters", None) else getattr(config, "max_position_embeddings", None)
        return learned or sys.maxsize

    def check_positions(self, option: str, tokens: int) -> None:
        """Refuse more tokens than the model can read.

        Raises:
            SawkvError: by the name of the option that asks for them.
        """
        if tokens > self.max_positions:
            raise SawkvError(f"{option}: expected at most {self.max_positions}, the model's positions, got {tokens}")

    @torch.inference_mode()
    def hidden(self, ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """States from which `logits` computes logits. Each row is read from an empty cache.

        Args:
            ids: [num_rows, length] token ids.
            positions: [length] int64; None is 0, 1, 2, ... Attention is causal in the order of tokens, whatever their
                positions.

        Returns:
            [num_rows, length, size].
        """
        ids = ids.to(self.device)
        options: dict[str, Any] = {"use_cache": False}
        if positions is not None:
            options["position_ids"] = positions.to(self.device)[None]
            # Without it Transformers takes a gap in positions for a new sequence.
            options["attention_mask"] = torch.ones_like(ids)
        if self._head is None:
            whole: torch.Tensor = self.model(ids, **options).logits
            return whole
        states: torch.Tensor = self.model.base_model(ids, **options).last_hidden_state
        return states

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits [..., vocab_size] fp32 of states [..., size]. Call it on pieces if all logits would not fit
        in memory.
        """
        if self._head is None:
            return hidden.float()
        logits: torch.Tensor = self._head(hidden)
        return logits.float()

    @contextlib.contextmanager
    def reading(self, readers: Sequence[LayerReaders | None]) -> Iterator[None]:
        """Within the block, layer i reads K and V through `readers[i]`. None leaves a layer unchanged."""
        with self._hooked([None if pair is None else _Reading(*pair) for pair in readers]):
            yield

    @contextlib.contextmanager
    def eager(self) -> Iterator[None]:
        """Within the block, attention is Transformers' eager one, whose order of operations differs. Hooks have no
        effect.
        """
        self.model.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.model.set_attn_implementation(ATTENTION)

    def states(self, ids: torch.Tensor, positions: torch.Tensor | None = None) -> list[LayerStates]:
        """Q, K and V of each layer's attention on token ids [num_rows, length], at positions as in `hidden`."""
        recorders = [_Recording() for _ in self.layers]
        with self._hooked(recorders):
            for row in torch.split(ids, 1):
                self.hidden(row, positions)
        return [recorder.states(layer) for layer, recorder in zip(self.layers, recorders, strict=True)]

    @torch.inference_mode()
    def continue_greedily(self, ids: torch.Tensor, count: int) -> torch.Tensor:
        """Greedy continuation of ids [num_rows, length] with an unquantized cache: [num_rows, count] token ids."""
        cache, tokens, step = None, [], ids.to(self.device)
        for _ in range(count):
            output = self.model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, step = output.past_key_values, output.logits[:, -1:].argmax(-1)
            tokens.append(step)
        return torch.cat(tokens, 1)

    @contextlib.contextmanager
    def _hooked(self, hooks: Sequence[_Reading | _Recording | None]) -> Iterator[None]:
        """Within the block, layer i has `hooks[i]`."""
        try:
            for layer, hook in zip(self.layers, hooks, strict=True):
                setattr(layer, _HOOK, hook)
            yield
        finally:
            for layer in self.layers:
                setattr(layer, _HOOK, None)

    def _find_layers(self) -> AttentionShape:
        """Fill `layers` and `heads` by one pass over two tokens, and return the shape."""
        found: list[tuple[nn.Module, int, int, int]] = []

        def note(
            layer: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
            found.append((layer, q.shape[1], k.shape[1], k.shape[3]))
            return k, v, mask

        for module in self.model.modules():
            setattr(module, _HOOK, note)
        try:
            with torch.inference_mode():
                self.model(torch.zeros(1, 2, dtype=torch.int64, device=self.device), use_cache=False)
        finally:
            for module in self.model.modules():
                delattr(module, _HOOK)
        self.layers, self.heads = [layer for layer, *_ in found], [(heads, dim) for _, _, heads, dim in found]
        if not found or len(set(map(id, self.layers))) != len(found):
            raise UnsupportedError(
                "expected a model whose attention layers use Transformers' AttentionInterface once each, got"
                f" {type(self.model).__name__}"
            )
        if not all(getattr(layer, "is_causal", True) for layer in self.layers):
            raise UnsupportedError(
                f"expected a model with causal attention, got {type(self.model).__name__}, whose tokens see later ones"
            )
        return AttentionShape(len(found), *found[0][1:])

    def _plain_head(self) -> nn.Module | None:
        """The output embedding, if the model's logits are its product with the trunk's states. None for models that
        scale or soft-cap logits.
        """
        head: nn.Module | None = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if head is None or self.model.base_model is self.model:
            return None
        with torch.inference_mode():
            ids = torch.arange(4, device=self.device)[None]
            want = self.model(ids, use_cache=False).logits.float()
            got = head(self.model.base_model(ids, use_cache=False).last_hidden_state).float()
        return head if got.shape == want.shape and torch.allclose(got, want, rtol=1e-3, atol=1e-3) else None


def output_weight(layer: nn.Module, width: int) -> torch.Tensor | None:
    """The output projection of an attention layer, [hidden_size, width]. None if it is not found, or is quantized.

    Args:
        layer: the attention module.
        width: num_q_heads * head_dim.
    """
    for name, child in layer.named_children():
        child = getattr(child, "base_layer", child)  # PEFT's adapters wrap the layer
        weight = getattr(child, "weight", None)
        if name in ("o_proj", "out_proj", "dense", "c_proj") and isinstance(weight, torch.Tensor) and weight.ndim == 2:
            weight = weight.detach().mT if isinstance(child, Conv1D) else weight.detach()
            if (
                weight.shape[1] == width
                and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
                and not weight.is_meta
            ):
                return weight
    return None


def measure(
    model: EvalModel,
    ids: torch.Tensor,
    context: int,
    step: Callable[[list[LayerStates]], object] = lambda states: None,
    sources: Sequence[int] | None = None,
) -> list[LayerStatistics]:
    """Statistics of all layers on token ids [num_windows, window], with windows spread over `context` tokens.

    Args:
        model: the model.
        ids: the windows.
        context: tokens.
        step: called with the states of each window.
        sources: for each layer, the index of the layer whose statistics it adds to; None is its own. The statistics of
            a layer that adds to another's stay empty.
    """
    sources = range(len(model.layers)) if sources is None else sources
    found: list[LayerStatistics] = []
    buckets = bucketed_context(model.model.config.get_text_config(), context)
    for each in passes(ids.cpu(), preparation_positions(len(ids), ids.shape[1], context), buckets):
        states = model.states(each.ids[None], each.positions)
        found = found or [layer.empty_statistics(buckets) for layer in states]
        for source, layer in zip(sources, states, strict=True):
            found[source].add(layer.q, layer.k, layer.v, each.positions, each.is_probe)
        if not each.is_probe:
            step(states)
    return found


def kv_sources(decoder: PretrainedConfig) -> list[int]:
    """The layer whose K and V each layer reads: its own, or that of an earlier layer. The last `num_kv_shared_layers`
    read those of the last layer before them that has their type (Gemma 3n, Gemma 4).

    Args:
        decoder: the language model's config.
    """
    count = decoder.num_hidden_layers
    owners = count - (getattr(decoder, "num_kv_shared_layers", None) or 0)
    if owners == count:
        return list(range(count))
    types = decoder.layer_types
    return [i if i < owners else max(j for j in range(owners) if types[j] == types[i]) for i in range(count)]


class _Reading:
    """A hook that replaces K and V by what a cache would return.

    If some tokens are kept unquantized, attention gets every token twice, first as stored and then as it is, and a mask
    that shows each query one of the two.
    """

    def __init__(self, read_k: Reader, read_v: Reader, kept: Kept | None = None) -> None:
        self._read_k, self._read_v, self._kept = read_k, read_v, kept

    def __call__(
        self, layer: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        stored_k, stored_v = self._through(self._read_k, k), self._through(self._read_v, v)
        if self._kept is None:
            return stored_k, stored_v, mask
        length = k.shape[2]
        kept = self._kept.mask(length).to(k.device)
        if mask is None:
            mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=k.device).tril()
        return (
            torch.cat([stored_k, k], 2),
            torch.cat([stored_v, v], 2),
            torch.cat([mask & ~kept, mask & kept], -1),
        )

    @staticmethod
    def _through(read: Reader, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([read(rows).transpose(0, 1) for rows in x.transpose(1, 2).float()]).to(x.dtype)


class _Recording:
    """A hook that records Q, K and V."""

    def __init__(self) -> None:
        self._rows: list[tuple[torch.Tensor, ...]] = []

    def __call__(
        self, layer: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        self._rows.append((_rows(q), _rows(k), _rows(v)))
        return k, v, mask

    def states(self, layer: nn.Module) -> LayerStates:
        q, k, v = (torch.cat(parts) for parts in zip(*self._rows, strict=True))
        scale = getattr(layer, "scaling", None)
        weight = output_weight(layer, q.shape[1] * v.shape[2])
        window = getattr(layer, "sliding_window", None) or 0
        return LayerStates(q, k, v, weight, float(k.shape[2] ** -0.5 if scale is None else scale), window)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[batch, num_heads, length, head_dim] to rows [batch * length, num_heads, head_dim] fp32."""
    return x.transpose(1, 2).flatten(0, 1).float()


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The registered attention function: `sdpa`, on the K, V and mask that the hook returns."""
    hook = getattr(module, _HOOK, None)
    if hook is not None:
        key, value, attention_mask = hook(module, query, key, value, attention_mask)
    softcap, sinks = kwargs.pop("softcap", None), kwargs.pop("s_aux", None)
    if softcap is None and sinks is None:
        attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return attended, None
    scaling = kwargs.get("scaling")
    return (
        _capped_attention(
            query, key, value, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, sinks
        ),
        None,
    )


def _capped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention with a soft-cap on scores (Gemma 2) or with sinks (gpt-oss), which `sdpa` lacks.

    Args:
        query: [num_rows, num_q_heads, num_queries, head_dim].
        key, value: [num_rows, num_kv_heads, length, head_dim].
        mask: [num_rows, 1, num_queries, length] bool, true where a query sees a key; None is causal, for as many keys
            as queries.
        scaling: factor of q.k.
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: [num_q_heads] logits of a key that every query sees, and that has no value.

    Returns:
        [num_rows, num_queries, num_q_heads, head_dim] in the query's dtype.
    """
    group, length = query.shape[1] // key.shape[1], key.shape[2]
    key, value = (x.float().repeat_interleave(group, 1) for x in (key, value))
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    scores = query.float() @ key.mT * scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~mask, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    attended = scores.softmax(-1)[..., :length] @ value
    return attended.transpose(1, 2).to(query.dtype)


@contextlib.contextmanager
def _readable(checkpoint: Path) -> Iterator[dict[str, Any]]:
    """Arguments of `from_pretrained`. Within the block, errors of the checkpoint are raised as ours, without progress
    bars of Transformers.
    """
    if checkpoint.suffix == ".gguf" and checkpoint.is_file():
        source = {"pretrained_model_name_or_path": checkpoint.absolute().parent, "gguf_file": checkpoint.name}
    elif (checkpoint / "config.json").is_file():
        check_weights(checkpoint)
        if wrong := wrong_sizes(parse_config(checkpoint / "config.json")):
            raise SawkvError(f"model: {'; '.join(wrong)} of {checkpoint}")
        source = {"pretrained_model_name_or_path": checkpoint}
    else:
        raise SawkvError(f"model: expected a checkpoint directory with a config.json, or a GGUF file, got {checkpoint}")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield source
    except SawkvError:
        raise
    except Exception as error:  # many kinds: of files, of fields in config.json, of arithmetic with them
        why = f"{type(error).__name__}: {reason(error)}"
        raise SawkvError(f"model: expected a checkpoint that Transformers loads, got {checkpoint}: {why}") from error
    finally:
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
