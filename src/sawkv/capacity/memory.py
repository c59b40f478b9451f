"""vLLM's division of GPU memory (0.33): its share, minus weights, minus what it allocates for good and the peak of a
profiling step, minus memory outside torch, divided into blocks.

The profiling step is estimated from shapes, so totals are within about 2 %. The number of blocks for given bytes of KV
cache, and the blocks that a request takes, are exact.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import Final

from sawkv.capacity.caches import KVCache
from sawkv.capacity.model import Attention, ModelShape, State
from sawkv.capacity.stages import pipeline_stages, stage_weights
from sawkv.errors import SawkvError, UnsupportedError
from sawkv.format.layout import RECENT_PAGE_SIZE

GIB: Final = 1 << 30
_UNITS: Final = {"M": 1 << 20, "G": GIB, "T": 1 << 40}

DRIVER_SHARE: Final = 0.9 / 80
"""Share of a card's memory that CUDA does not report. Measured: an H100 of 80 GiB reports 79.1."""

OUTSIDE_TORCH: Final = GIB // 2
"""Bytes of kernels, graphs, cuBLAS workspaces and so on, which a start of vLLM adds. Measured: the unexplained rest of
a start on an H100 (vLLM 0.26, Qwen3-8B in bf16, 394,576 tokens).
"""

BATCH_DEFAULTS: Final = ((160 * GIB, 16384, 1024), (70 * GIB, 8192, 1024), (0, 2048, 256))
"""Defaults of vLLM's server by least memory: `--max-num-batched-tokens` and `--max-num-seqs`."""

SMALL_BATCH_CARDS: Final = ("a100", "gb10")
"""Names of cards that get the last of these defaults although they have more than 70 GiB."""


def size_bytes(option: str, text: str) -> int:
    """Bytes of a text such as 80GiB. GB counts as GiB, as in the names of cards.

    Raises:
        SawkvError: the text is no size; `option` names the user's option.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MGT])i?B?", text, re.ASCII | re.IGNORECASE)
    if match is None or not float(match[1]):
        raise SawkvError(f"{option}: expected a number with a unit such as 80GiB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def card(size: str | None) -> tuple[int, str]:
    """Bytes that CUDA reports for a card of `size`, and ""; without a size, bytes and name of the GPU here.

    Raises:
        SawkvError: the text is no size.
        UnsupportedError: no size is given, and there is no GPU.
    """
    if size is not None:
        return int(size_bytes("--gpu-memory", size) * (1 - DRIVER_SHARE)), ""
    import torch

    if not torch.cuda.is_available():
        raise UnsupportedError("plan: expected --gpu-memory SIZE where there is no GPU, for example --gpu-memory 80GiB")
    return torch.cuda.mem_get_info()[1], torch.cuda.get_device_name()


@dataclass(frozen=True)
class Setting:
    """Options of vLLM. Defaults are those of its server.

    Attributes:
        gpu_memory: bytes of one card, as CUDA reports them.
        gpu_name: name of the card, if known.
        context: `--max-model-len`, in tokens.
        max_num_batched_tokens, max_num_seqs: None is vLLM's default on such a card.
        block_size: None is the default on a GPU.
        prefix_caching: whether requests share prefixes. Recurrent layers then hold more states.
        pipeline_parallel: groups of cards that each have some of the layers.
        drafted: tokens that a draft proposes per step. A request holds a recurrent state for each.

    Raises:
        SawkvError: a value is out of range.
    """

    gpu_memory: int
    context: int
    gpu_name: str = ""
    gpu_memory_utilization: float = 0.92
    tensor_parallel: int = 1
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    block_size: int | None = None
    prefix_caching: bool = True
    pipeline_parallel: int = 1
    drafted: int = 0

    def __post_init__(self) -> None:
        for name in ("context", "tensor_parallel", "pipeline_parallel", "max_num_batched_tokens", "max_num_seqs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SawkvError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise SawkvError(
                f"--gpu-memory-utilization: expected above 0 and at most 1, got {self.gpu_memory_utilization}"
            )

    @property
    def batched_tokens(self) -> int:
        return self.max_num_batched_tokens or min(self._batch_defaults[0], self._batch_defaults[1] * self.context)

    @property
    def concurrent_steps(self) -> int:
        """Steps in flight with asynchronous scheduling. A sliding window keeps pages for each."""
        return 1 + self.pipeline_parallel

    @property
    def seqs(self) -> int:
        return self.max_num_seqs or min(self._batch_defaults[1], self.batched_tokens)

    @property
    def _batch_defaults(self) -> tuple[int, int]:
        small = self.gpu_memory < BATCH_DEFAULTS[0][0] and any(
            name in self.gpu_name.lower() for name in SMALL_BATCH_CARDS
        )
        return next(
            (tokens, seqs)
            for least, tokens, seqs in BATCH_DEFAULTS
            if self.gpu_memory >= least and not (small and least)
        )


@dataclass(frozen=True)
class Blocks:
    """How vLLM divides a KV cache into blocks.

    Attributes:
        nbytes: bytes of a block, in all layers of one group.
        of_request: blocks of a request of the full context, in all groups.
        of_states: those of them that hold recurrent states.
        least: blocks with which vLLM starts.
        block_size: tokens per block of attention.
        least_prefix_hit: prefixes are found in multiples of this many tokens; None without prefix caching.
    """

    nbytes: int
    of_request: int
    of_states: int
    least: int
    block_size: int
    least_prefix_hit: int | None


@dataclass(frozen=True)
class Plan:
    """Bytes on each card, and the capacity of the KV cache.

    Attributes:
        bytes_per_token: of K and V, in all layers of the fullest stage that store them; 0 if none of it do.
        bytes_per_token_of_all_stages: on one card of each stage.
        tokens: as vLLM reports them: concurrent requests times the context.
        requests: concurrent requests of the full context. vLLM starts with at least one.
    """

    format: str
    usable: int
    weights: int
    activations: int
    workspace: int
    token_counts: int
    outside_torch: int
    kv_cache: int
    bytes_per_token: int
    bytes_per_token_of_all_stages: int
    state_bytes_per_request: int
    block_size: int
    least_prefix_hit: int | None
    tokens: int
    requests: float
    fits: bool


def make_plan(shape: ModelShape, setting: Setting, cache: KVCache, weight_bytes: int) -> Plan:
    """What fits with K and V stored as in `cache`.

    Args:
        weight_bytes: of the whole model.

    Raises:
        UnsupportedError: the tensor parallel size does not divide the heads.
    """
    ranks = setting.tensor_parallel
    for layer in shape.attention:
        if layer.num_q_heads % ranks or (layer.num_kv_heads % ranks and ranks % layer.num_kv_heads):
            raise UnsupportedError(
                f"--tensor-parallel: expected a divisor of {layer.num_q_heads} and {layer.num_kv_heads} heads, got"
                f" {ranks}"
            )
    for state in shape.states:
        if state.heads % ranks or state.channels % ranks:
            raise UnsupportedError(
                f"--tensor-parallel: expected a divisor of {state.heads} heads and {state.channels} channels of states,"
                f" got {ranks}"
            )
    if setting.pipeline_parallel > shape.num_layers:
        raise UnsupportedError(
            f"--pipeline-parallel: expected at most one per layer of {shape.num_layers}, got"
            f" {setting.pipeline_parallel}"
        )
    stages = pipeline_stages(shape.num_layers, setting.pipeline_parallel)
    plans = [_plan_of(stage, shape, setting, cache, weight_bytes) for stage in stages]
    return min(plans, key=lambda plan: plan.tokens)  # vLLM gives all cards as many blocks as the fullest has


def _plan_of(stage: range, shape: ModelShape, setting: Setting, cache: KVCache, weight_bytes: int) -> Plan:
    """What fits if all cards are like those of one stage."""
    ranks, is_last = setting.tensor_parallel, stage.stop == shape.num_layers
    usable = int(setting.gpu_memory * setting.gpu_memory_utilization)
    weights = stage_weights(stage, shape, weight_bytes) // ranks
    activations = _profile_peak(shape, setting, is_last)
    workspace = _expert_workspace(shape, setting)  # vLLM has one workspace for all
    if cache.cache_format is not None:
        workspace = max(workspace, _prefill_workspace(shape, setting))
    token_counts = _token_counts(shape, setting) if is_last else 0
    kv_cache = max(0, usable - weights - activations - workspace - token_counts - OUTSIDE_TORCH)
    blocks = cut_blocks(shape, setting, cache, stage)
    num_blocks = kv_cache // blocks.nbytes if blocks.nbytes else sys.maxsize
    requests = num_blocks / blocks.of_request
    in_stage = [layer for layer, i in zip(shape.attention, shape.attention_places, strict=True) if i in stage]
    return Plan(
        format=cache.name,
        usable=usable,
        weights=weights,
        activations=activations,
        workspace=workspace,
        token_counts=token_counts,
        outside_torch=OUTSIDE_TORCH,
        kv_cache=kv_cache,
        bytes_per_token=sum(cache.token_bytes(layer, ranks) for layer in in_stage),
        bytes_per_token_of_all_stages=sum(cache.token_bytes(layer, ranks) for layer in shape.attention),
        state_bytes_per_request=blocks.of_states * blocks.nbytes,
        block_size=blocks.block_size,
        least_prefix_hit=blocks.least_prefix_hit,
        tokens=int(requests * setting.context),
        requests=requests,
        fits=num_blocks >= blocks.least,
    )


def widest(plans: Sequence[tuple[KVCache, Plan]], tokens: int) -> KVCache:
    """The first cache that holds so many tokens.

    Args:
        plans: caches with what fits in each, most bits first, at least one.

    Raises:
        SawkvError: none does.
    """
    for cache, plan in plans:
        if plan.tokens >= tokens:
            return cache
    most = plans[-1][1]
    raise SawkvError(
        f"--tokens: expected at most {most.tokens:,}, which {most.format} holds in {most.kv_cache / GIB:.2f} GiB of"
        f" each card, got {tokens:,}"
    )


def longest_context(shape: ModelShape, setting: Setting, cache: KVCache, weight_bytes: int) -> int:
    """Longest context, up to the one set, with which vLLM would start; 0 if there is none."""
    low, high = 0, setting.context
    while low < high:
        middle = (low + high + 1) // 2
        if make_plan(shape, replace(setting, context=middle), cache, weight_bytes).fits:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True)
class _Pages:
    """One layer's part of a block. Layers that are equal in all of this can share a group."""

    kind: Attention | State
    block_size: int
    nbytes: int
    reserves_steps: bool = True

    def of_request(self, setting: Setting) -> int:
        """Blocks that a request of the full context holds."""
        if isinstance(self.kind, State):
            return (self.kind.held if setting.prefix_caching else 1) + setting.drafted
        if not self.kind.window:
            return -(-setting.context // self.block_size)
        kept = self.kind.window - 1 + self.reserves_steps * setting.concurrent_steps * setting.batched_tokens
        return -(-min(kept, setting.context) // self.block_size) + 1


def cut_blocks(shape: ModelShape, setting: Setting, cache: KVCache, stage: range | None = None) -> Blocks:
    """Blocks as vLLM makes them if the pages of each layer lie in a region of their own (its layouts LBNHC and LBHNC).

    With recurrent states vLLM lengthens the block of attention until its page holds a state. Layers that differ are
    split into groups of equal size, which share memory: a block serves one group at a time, so all pages have the bytes
    of the largest.

    Args:
        stage: layers of a pipeline stage, whose part of a block `Blocks.nbytes` is. None is all layers.
    """
    block_size, ranks = _block_size(shape, setting, cache), setting.tensor_parallel
    layers = [
        _Pages(replace(layer, num_q_heads=0, drafts=False), block_size, block_size * cache.token_bytes(layer, ranks))
        for layer in shape.attention
    ]
    layers += [_Pages(state, block_size, layers[0].nbytes) for state in shape.states]
    places = (*shape.attention_places, *shape.state_places)
    if cache.recent:  # each layer has a second one, whose pages are padded to the bytes of the first
        kinds = [Attention(0, of.num_kv_heads, of.head_dim, cache.recent) for of in shape.attention]  # all alike
        layers += [_Pages(kind, RECENT_PAGE_SIZE, layers[0].nbytes, reserves_steps=False) for kind in kinds]
        places = (*places, *shape.attention_places)
    is_here = [stage is None or place in stage for place in places]
    windows = {layer.kind.window if isinstance(layer.kind, Attention) else None for layer in layers}
    if len(windows) == 1:  # all keep the same tokens: one group, whatever their sizes
        nbytes = sum(layer.nbytes for layer, here in zip(layers, is_here, strict=True) if here)
        groups = [layers[0]]
    else:
        largest = max(layer.nbytes for layer in layers)
        layers = [_enlarge(layer, largest) for layer in layers]
        alike: dict[_Pages, list[bool]] = {}
        for layer, here in zip(layers, is_here, strict=True):
            alike.setdefault(layer, []).append(here)
        least, most = min(map(len, alike.values())), max(map(len, alike.values()))
        size = least if most >= 1.5 * least else most
        split = [
            (layer, here[i :: -(-len(here) // size)])
            for layer, here in alike.items()
            for i in range(-(-len(here) // size))
        ]
        groups = [layer for layer, _ in split]
        nbytes = largest * max(sum(here) for _, here in split)
    return Blocks(
        nbytes=nbytes,
        of_request=sum(group.of_request(setting) for group in groups),
        of_states=sum(group.of_request(setting) for group in groups if isinstance(group.kind, State)),
        # One is kept back. A request alone has to find room for a step's newest tokens.
        least=1 + sum(replace(group, reserves_steps=True).of_request(setting) for group in groups),
        block_size=max(group.block_size for group in groups if isinstance(group.kind, Attention)),
        least_prefix_hit=lcm(*(group.block_size for group in groups)) if setting.prefix_caching else None,
    )


def _block_size(shape: ModelShape, setting: Setting, cache: KVCache) -> int:
    """Tokens per block: the smallest multiple that kernels take with which a page of attention holds any state."""
    unit = setting.block_size or cache.block_size
    state_bytes = max((state.nbytes(setting.tensor_parallel) for state in shape.states), default=0)
    return unit * max(1, -(-state_bytes // (unit * cache.token_bytes(shape.attention[0], setting.tensor_parallel))))


def _enlarge(layer: _Pages, nbytes: int) -> _Pages:
    """The layer with pages of `nbytes`: with more tokens if that is exact, else padded."""
    more = nbytes // layer.nbytes if nbytes % layer.nbytes == 0 and isinstance(layer.kind, Attention) else 1
    return replace(layer, block_size=layer.block_size * more, nbytes=nbytes)


def _profile_peak(shape: ModelShape, setting: Setting, makes_logits: bool) -> int:
    """Peak bytes of vLLM's profiling step.

    It passes `batched_tokens` through the widest part of a layer, and then makes logits of `seqs` tokens in 16 and 32
    bits.
    """
    tokens, ranks = setting.batched_tokens, setting.tensor_parallel
    dense = 3 * shape.intermediate_size // ranks  # gate and up, and their product
    expert = shape.expert_size // ranks
    # An expert's second product may reuse the memory of the first.
    sparse = shape.experts_per_token * (max(2 * expert, shape.hidden_size) + expert)
    layer = 2 * tokens * (shape.hidden_size + max(dense, sparse, shape.mixer_size // ranks))
    logits = 2 * tokens * shape.hidden_size + min(tokens, setting.seqs) * shape.vocab_size * (2 + 4)
    return max(layer, logits if makes_logits else 0)


def _expert_workspace(shape: ModelShape, setting: Setting) -> int:
    """Bytes of the workspace of vLLM's Triton experts: two products for each expert of each token, in 16 bits."""
    expert = shape.expert_size // setting.tensor_parallel
    widths = max(expert, shape.hidden_size) + max(2 * expert, shape.hidden_size)
    return 2 * setting.batched_tokens * shape.experts_per_token * widths


def _token_counts(shape: ModelShape, setting: Setting) -> int:
    """Bytes that vLLM 0.33 allocates to penalize repetition: per request, a count of each word of the vocabulary in the
    answer, and a bit of whether it is in the prompt. Older versions allocate them when a request asks for penalties.
    """
    return setting.seqs * (4 * shape.vocab_size + shape.vocab_size // 8)


def _prefill_workspace(shape: ModelShape, setting: Setting) -> int:
    """Bytes of the 16-bit workspace into which prefill decodes pages (vllm/prefill.py: workspace_tokens)."""
    tokens = max(setting.context, 2 * setting.batched_tokens)
    widest = max(max(1, layer.num_kv_heads // setting.tensor_parallel) * layer.head_dim for layer in shape.attention)
    return tokens * 2 * widest * 2
