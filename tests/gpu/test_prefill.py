"""An engine's attention over gathered rows: `pytest -m gpu tests/gpu/test_prefill.py`. Needs vLLM."""

from __future__ import annotations

import pytest
import torch

from sawkv import gather
from tests.conftest import make_batch, relative_error
from tests.kernel_checks import starts_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("window", [0, 15])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_nothing_behind_the_last_sequence_is_seen(backend: str, window: int, head_dim: int, dtype: torch.dtype) -> None:
    """The workspace is larger than the rows, as where a window leaves the first ones out, and holds NaN."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    lengths = [300, 77, 129]
    batch = make_batch("int4", lengths, head_dim=head_dim, device="cuda", page_size=16)
    starts = starts_of(lengths, "cuda")
    query = torch.randn(sum(lengths), 4, head_dim, device="cuda", dtype=dtype)
    outputs = []
    for rows, poison in ((sum(lengths) + 2000, torch.nan), (sum(lengths), 0.0)):
        k, v = torch.full((2, rows, 2, head_dim), poison, device="cuda", dtype=dtype)
        gather(batch.cache, batch.block_table, batch.seq_lens, starts, k, v, rotated=False, backend=backend)
        outputs.append(torch.empty_like(query))
        flash_attn_varlen_func(
            q=query,
            k=k,
            v=v,
            out=outputs[-1],
            cu_seqlens_q=starts,
            cu_seqlens_k=starts,
            max_seqlen_q=max(lengths),
            max_seqlen_k=max(lengths),
            softmax_scale=head_dim**-0.5,
            causal=True,
            window_size=[window - 1, 0] if window else [-1, -1],
            fa_version=get_flash_attn_version(head_size=head_dim),
        )
    assert relative_error(*outputs) < 1e-6
