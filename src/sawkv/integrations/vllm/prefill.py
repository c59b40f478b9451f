"""Prefill on a GPU: pages are decoded into a 16-bit workspace, to which vLLM's FlashAttention attends.

Prefill is bound by computation, so decoding costs little (2 ns per token and layer for 8 KV heads on an H100), and
attention runs at the engine's own speed. New tokens are read back from their pages too, so a token's output does not
depend on how its prompt was cut (docs/decisions/0002).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.v1.worker.workspace import current_workspace_manager

from sawkv import kernels, ops
from sawkv.errors import UnsupportedError
from sawkv.integrations.vllm import refusals
from sawkv.kernels import Prefixes

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata

DTYPES = (torch.bfloat16, torch.float16)
MAX_FLASH_HEAD_DIM = 256
"""Of FlashAttention 2 and 3."""
FLASH_4_ROWS = (1, 129, 257)
"""Query rows per KV head. FlashAttention 4 compiles a kernel for those that fit in a tile (64 to 192 rows), one for
those that fit in the two tiles that a Blackwell GPU works at, and one for more.
"""
FLASH_4_SPLITS = (1, 16, 32, 64, 128)
"""Parts of a context, which it attends to in parallel where few new tokens would leave the GPU idle. The kernel that
adds their outputs is compiled for each of these limits.
"""


@dataclass(frozen=True)
class PrefillSlice:
    """Requests whose contexts fit in the workspace together. Tensors are of these requests alone.

    Attributes:
        tokens: rows of query and output.
        cu_seqlens_q: [num_requests + 1] int32, where each request starts in these rows.
        prefixes: tokens to decode, the last of each context, and where each request starts in the workspace.
        num_keys: upper bound of the tokens to decode.
        max_query_len, max_seq_len: upper bounds.
        workspaces: K and V [num_keys, num_kv_heads, head_dim] to decode into, by `FlashPrefill.shape`. The first layer
            makes them for all.
    """

    tokens: slice
    cu_seqlens_q: torch.Tensor
    prefixes: Prefixes
    num_keys: int
    max_query_len: int
    max_seq_len: int
    workspaces: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


class Blocks(NamedTuple):
    """Keys in vLLM's own blocks, which attention reads where they lie.

    Attributes:
        block_table: [num_seqs, max_blocks] int32.
        seq_lens: [num_seqs] int32, tokens of each in these blocks, new ones included.
        cu_seqlens_q: [num_seqs + 1] int32, where each request starts in the step's rows.
        max_query_len: upper bound.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    max_query_len: int


def workspace_tokens(vllm_config: VllmConfig) -> int:
    """Tokens of the workspace: enough for any one request, and usually for all requests of a step."""
    longest = vllm_config.model_config.max_model_len + speculated_tokens(vllm_config)
    return int(max(longest, 2 * vllm_config.scheduler_config.max_num_batched_tokens))


def speculated_tokens(vllm_config: VllmConfig) -> int:
    """Tokens by which bounds of lengths may be too small in passes of a draft model: vLLM lengthens requests there, and
    not their bounds.
    """
    speculative = vllm_config.speculative_config
    return 0 if speculative is None else int(speculative.num_speculative_tokens or 0) + 1


def padded(most: int, vllm_config: VllmConfig) -> int:
    """`most` requests or tokens of a step, or as many as the batch of a CUDA graph is padded to."""
    return max([most, *(vllm_config.compilation_config.cudagraph_capture_sizes or [])])


@dataclass(frozen=True)
class HostLengths:
    """What the host knows of a step's requests, read once per step.

    Attributes:
        starts: rows of the step at which each request starts, and the end of the last.
        queries: new tokens of each.
        bounds: upper bounds of their contexts, new tokens included. Those of single requests may be too small by
            `speculated_tokens`.
        recent: newest tokens that layers keep elsewhere, and do not read from pages.
    """

    starts: list[int]
    queries: list[int]
    bounds: list[int]
    recent: int = 0

    @classmethod
    def of(cls, common: CommonAttentionMetadata, recent: int = 0) -> HostLengths:
        starts, bounds = common.query_start_loc_cpu.tolist(), common.seq_lens_cpu_upper_bound
        return cls(
            starts,
            [end - start for start, end in itertools.pairwise(starts)],
            [common.max_seq_len] * common.num_reqs if bounds is None else bounds.tolist(),
            recent,
        )


def find_turns(host: HostLengths, first: int, window: int, turns: Sequence[kernels.Turns | None]) -> list[bool]:
    """Whether each request reads its pages directly: those from `first` on that suit every kind of layer with this
    sliding `window`.
    """
    return [
        i >= first
        and all(turn is not None and turn.suit(n, min(bound, n + window) if window else bound) for turn in turns)
        for i, (n, bound) in enumerate(zip(host.queries, host.bounds, strict=True))
    ]


def slice_prefills(
    common: CommonAttentionMetadata,
    host: HostLengths,
    first: int,
    capacity: int,
    window: int,
    page_size: int,
    slack: int = 0,
    are_turns: Sequence[bool] = (),
) -> list[PrefillSlice]:
    """Cut the requests from `first` on into runs of at most `capacity` tokens of context. Does not synchronize.

    Bounds may be too small by `slack` tokens. With a sliding `window` the context starts at the page of the first key
    that a query sees, because vLLM may have reused earlier pages. Requests in `are_turns` are left out: they read
    their pages. `common` has the lengths without the newest tokens that layers keep elsewhere.

    Raises:
        UnsupportedError: a request does not fit in the workspace. vLLM's limit on the length of requests prevents this.
    """
    lengths = [bound + slack for bound in host.bounds] if common.seq_lens_cpu_upper_bound is not None else host.bounds
    if window:
        lengths = [min(bound, n + window + page_size - 2) for bound, n in zip(lengths, host.queries, strict=True)]
    if host.recent:  # FlashAttention wants a row, also where nobody reads it
        lengths = [max(bound - host.recent, 1) for bound in lengths]
    if max(lengths[first:]) > capacity + slack:
        raise UnsupportedError(f"sawkv: expected contexts of at most {capacity} tokens, got {max(lengths[first:])}")
    left_out = are_turns or [False] * common.num_reqs
    runs = _runs(lengths, first, left_out, capacity)
    return [_slice(common, host, run, lengths, capacity, window, page_size) for run in runs]


def _runs(lengths: Sequence[int], first: int, left_out: Sequence[bool], capacity: int) -> Iterator[slice]:
    """Neighbouring requests from `first` on whose lengths add up to `capacity` at most. A longer one is alone."""
    start, total = first, 0
    for i in range(first, len(lengths)):
        if left_out[i] or total + lengths[i] > capacity:
            if i > start:
                yield slice(start, i)
            start, total = i + left_out[i], 0
        if not left_out[i]:
            total += lengths[i]
    if start < len(lengths):
        yield slice(start, len(lengths))


def _slice(
    common: CommonAttentionMetadata,
    host: HostLengths,
    run: slice,
    lengths: Sequence[int],
    capacity: int,
    window: int,
    page_size: int,
) -> PrefillSlice:
    """The slice of a run of requests. `lengths`: upper bounds of the tokens that each request reads."""
    query_start_loc = common.query_start_loc[run.start : run.stop + 1]
    seq_lens, block_table = common.seq_lens[run], common.block_table_tensor[run]
    first_positions = None
    if window:
        first_keys = seq_lens - query_start_loc.diff() - window + 1
        skipped = first_keys.clamp_min(0) // page_size
        pages = torch.arange(-(-max(lengths[run]) // page_size), device=seq_lens.device)
        block_table = block_table.gather(1, (skipped[:, None] + pages).clamp_max(block_table.shape[1] - 1))
        first_positions = (skipped * page_size).int()
        seq_lens = seq_lens - first_positions
    first_token, end = host.starts[run.start], host.starts[run.stop]
    cu_seqlens_q = query_start_loc - first_token if first_token else query_start_loc
    if lengths[run] == host.queries[run] and not host.recent:  # without a cached prefix the new tokens are the context
        cu_seqlens_k = cu_seqlens_q
    else:
        cu_seqlens_k = torch.zeros(len(seq_lens) + 1, dtype=torch.int32, device=seq_lens.device)
        torch.cumsum(seq_lens, 0, dtype=torch.int32, out=cu_seqlens_k[1:])
    return PrefillSlice(
        tokens=slice(first_token, end),
        cu_seqlens_q=cu_seqlens_q,
        prefixes=ops.prefixes(block_table, seq_lens, cu_seqlens_k, first_positions),
        num_keys=min(sum(lengths[run]), capacity),
        max_query_len=max(host.queries[run]),
        max_seq_len=max(lengths[run]),
    )


class FlashPrefill:
    """Prefill attention of one layer."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        head_size: int,
        num_kv_heads: int,
        scale: float,
        sliding_window: int,
        logits_soft_cap: float,
        sinks: torch.Tensor | None,
    ) -> None:
        """
        Raises:
            UnsupportedError: vLLM has no FlashAttention for this layer here.
        """
        # vLLM has resolved the name by now.
        self.dtype: torch.dtype = vllm_config.model_config.dtype  # type: ignore[assignment]
        version = get_flash_attn_version(head_size=head_size, has_sinks=sinks is not None)
        if version is None or self.dtype not in DTYPES:
            raise UnsupportedError(
                "sawkv on a GPU: expected vLLM's FlashAttention and a model in bfloat16 or float16, "
                f"got FlashAttention {version} and {self.dtype}"
            )
        if head_size > MAX_FLASH_HEAD_DIM and version < 4:
            raise UnsupportedError(
                f"sawkv on a GPU: expected FlashAttention 4 for head_dim {head_size}, got FlashAttention {version},"
                f" which this card or --attention-config takes. {refusals.WAY_OUT}"
            )
        if sinks is not None and version == 2:
            raise UnsupportedError(
                "sawkv on a GPU: expected FlashAttention 3 or newer for a model with attention sinks, got"
                f" FlashAttention 2, which this card or --attention-config takes. {refusals.WAY_OUT}"
            )
        # It is there only where CUDA is.
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func  # type: ignore[attr-defined]

        self._flash_attention = flash_attn_varlen_func
        self.capacity = workspace_tokens(vllm_config)
        self.shape = (self.capacity, num_kv_heads, head_size)
        self._options: dict[str, Any] = {
            "softmax_scale": scale,
            "causal": True,
            "window_size": [sliding_window - 1, 0] if sliding_window else [-1, -1],
            "softcap": logits_soft_cap,
            "fa_version": version,
        }
        self._sinks = sinks

    def workspace(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of `workspace_tokens` tokens, shared by all layers. First allocated while vLLM profiles memory, so
        that vLLM counts it.
        """
        k, v = current_workspace_manager().get_simultaneous((self.shape, self.dtype), (self.shape, self.dtype))
        return k, v

    def attend(
        self,
        query: torch.Tensor,
        pages: ops.Pages,
        prefill: PrefillSlice,
        output: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> None:
        """Attend the queries of one slice to a layer's pages. query, output: [num_tokens, num_heads, head_size] with
        all tokens of the step. lse: [num_heads, num_tokens] fp32 receives the log-sum-exps, without the sink.
        """
        if self.shape not in prefill.workspaces:
            k, v = self.workspace()
            prefill.workspaces[self.shape] = k[: prefill.num_keys], v[: prefill.num_keys]
        k, v = prefill.workspaces[self.shape]
        pages.gather(prefill.prefixes, k, v, rotated=False)
        if prefill.tokens.start:  # rows behind the slice are of no sequence; to leave them out takes time in each layer
            query, output = query[prefill.tokens], output[prefill.tokens]
        lengths = (prefill.cu_seqlens_q, prefill.prefixes.cu_seq_lens, prefill.max_query_len, prefill.max_seq_len)
        if lse is None:
            self._attend(query, k, v, output, *lengths)
            return
        _, found = self._attend(query, k, v, output, *lengths, s_aux=None, return_softmax_lse=True)
        lse[:, prefill.tokens] = found[:, : prefill.tokens.stop - prefill.tokens.start]

    def attend_blocks(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        blocks: Blocks,
        window: int,
        sinks: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend the queries of a step to the last `window` keys of each. Does not depend on lengths on the host.

        Args:
            q: [num_tokens, num_heads, head_dim].
            k, v: [num_blocks, block_size, num_kv_heads, head_dim].
            blocks: of the step's requests.
            window: tokens that a query sees, itself included.
            sinks: as in `ops.Attention`.

        Returns:
            Outputs like q, and log-sum-exps [num_heads, num_tokens] with the sink.
        """
        found: tuple[torch.Tensor, torch.Tensor] = self._flash_attention(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=blocks.cu_seqlens_q,
            seqused_k=blocks.seq_lens,
            block_table=blocks.block_table,
            max_seqlen_q=blocks.max_query_len,
            # Not the longest sequence: FlashAttention drops a window as wide.
            max_seqlen_k=blocks.block_table.shape[1] * k.shape[1],
            s_aux=sinks,
            return_softmax_lse=True,
            num_splits=1,  # a window is too short to be cut
            **self._options | {"window_size": [window - 1, 0]},
        )
        return found

    def attend_exactly(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, output: torch.Tensor
    ) -> None:
        """Attend a prompt to itself, without pages.

        Args:
            q, output: [num_tokens, num_heads, head_dim].
            k, v: [num_tokens, num_kv_heads, head_dim].
            cu_seqlens: [2] int32.
        """
        self._attend(q, k, v, output, cu_seqlens, cu_seqlens, len(q), len(k))

    def warm_up(self, num_heads: int, num_seqs: int) -> None:
        """Call FlashAttention 4 once for each kernel that it compiles when it first needs one: for short and for long
        prompts, for few and for many, for contexts in one and in several parts. Older versions come compiled.

        Args:
            num_heads: query heads of the layer.
            num_seqs: most requests of a step.
        """
        if self._options["fa_version"] < 4:
            return
        _, num_kv_heads, head_dim = self.shape
        k, v = (rows[:2] for rows in self.workspace())
        q = torch.zeros(2, num_heads, head_dim, dtype=self.dtype, device=k.device)
        for seqs, rows, splits in itertools.product((1, num_seqs), FLASH_4_ROWS, FLASH_4_SPLITS):
            # Bounds and counts choose the kernel. All requests but the first are empty.
            starts = torch.full((seqs + 1,), len(q), dtype=torch.int32, device=k.device)
            starts[0] = 0
            query_len = -(-rows * num_kv_heads // num_heads)
            self._attend(q, k, v, torch.empty_like(q), starts, starts, query_len, self.capacity, num_splits=splits)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        output: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_query_len: int,
        max_seq_len: int,
        **more: Any,
    ) -> Any:
        return self._flash_attention(
            q=q,
            k=k,
            v=v,
            out=output,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_query_len,
            max_seqlen_k=max_seq_len,
            **{"s_aux": self._sinks} | self._options | more,
        )
