"""Linear layers of a model that is measured on a CPU without 16-bit products.

There PyTorch multiplies 16-bit matrices element by element, at an eighth of the speed of fp32 (a CPU with AVX2 and
torch 2.13), which is nine tenths of the time that preparation takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

LEAST_ROWS: Final = 16
"""Fewer rows do not pay for a copy of the weight in fp32."""


class LinearInFp32(TorchFunctionMode):
    """Within the block, linear layers on a CPU whose 16-bit products are slow compute in fp32. They round their output
    to the dtype of their input, so they are more exact than without. Code that is compiled does not see the mode.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear and args and _pays(args[0]):
            rest = [None if x is None else x.float() for x in args[1:]]
            return func(args[0].float(), *rest, **{name: x.float() for name, x in kwargs.items() if x is not None}).to(
                args[0].dtype
            )
        return func(*args, **kwargs)


def _pays(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.numel() >= LEAST_ROWS * x.shape[-1] and not _multiplies(x.dtype)


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of the dtype at full speed, as PyTorch asks oneDNN."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype != torch.float16 or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
