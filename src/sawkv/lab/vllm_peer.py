"""vLLM's own INT4 write kernel, called on rows. Used to compare accuracy; needs a GPU."""

from __future__ import annotations

import torch

PAGE_SIZE = 16


def available(device: torch.device) -> bool:
    """Whether vLLM's kernel can run on this device."""
    if device.type != "cuda":
        return False
    try:
        from vllm.v1.attention.ops import int4_per_token_head
    except ImportError:
        return False
    return hasattr(int4_per_token_head, "reshape_and_cache_int4")


def store(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Write rows into pages by vLLM's kernel, rotation included, and read the bytes back.

    Args:
        rows: [num_tokens, num_kv_heads, head_dim] bf16, fp16 or fp32 on a GPU.

    Returns:
        Codes [num_tokens, num_kv_heads, head_dim] uint8, 0 to 15, and scales [num_tokens, num_kv_heads, 1] fp32, whose
            lowest four bits hold the zero points.
    """
    from vllm.v1.attention.ops.int4_per_token_head import reshape_and_cache_int4

    num_tokens, num_kv_heads, head_dim = rows.shape
    num_pages = -(-num_tokens // PAGE_SIZE)
    codes = torch.zeros(2, num_pages, PAGE_SIZE, num_kv_heads, head_dim // 2, dtype=torch.uint8, device=rows.device)
    scales = torch.zeros(2, num_pages, PAGE_SIZE, num_kv_heads, dtype=torch.float32, device=rows.device)
    slots = torch.arange(num_tokens, device=rows.device)
    reshape_and_cache_int4(rows, rows, codes[0], codes[1], slots, k_scale_cache=scales[0], v_scale_cache=scales[1])
    packed = codes[0].flatten(0, 1)[:num_tokens]
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2), scales[0].flatten(0, 1)[:num_tokens, :, None]
