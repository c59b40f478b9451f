"""New K and V on their way from a model to a layer's pages, and the checks of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from sawkv import ops
from sawkv.errors import LayoutError, UnsupportedError
from sawkv.integrations.transformers.models import NAME

if TYPE_CHECKING:
    from sawkv.integrations.transformers.layer import SawLayer


@dataclass(eq=False)
class NewStates:
    """New K and V for a layer's pages. `SawCache.update` returns it to our attention function in place of K and of V.

    Attributes:
        key, value: [batch_size, num_kv_heads, num_new, head_dim].
        layer, handle: the layer, and its cache.
    """

    key: torch.Tensor
    value: torch.Tensor
    layer: SawLayer
    handle: int

    def to(self, device: Any) -> NewStates:
        """The same, where a model moves what layers share to the device of their queries.

        Raises:
            UnsupportedError: it is another device, or no device.
        """
        if device != self.key.device:
            self.refuse()
        return self

    def refuse(self) -> NoReturn:
        """Refuse to be read as tensors by anything but our attention function.

        Raises:
            UnsupportedError: always.
        """
        model = self.layer.model_type
        raise UnsupportedError(
            f'sawkv: expected K and V of this {model} to be read by attention implementation "{NAME}" alone, which its'
            f" config names. Either {model} computes attention by itself, or changes K and V before: then call"
            ' model.set_attn_implementation("eager") (or load it so), with which a SawCache works. Or the config is'
            " not that of the model that runs: then use SawCache(model.config) of that same model"
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what Python and PyTorch look for in any object
            raise AttributeError(name)
        self.refuse()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        leaves, _ = torch.utils._pytree.tree_flatten((args, kwargs or {}))
        next(leaf for leaf in leaves if isinstance(leaf, cls)).refuse()


def _refuse(states: NewStates, *args: Any) -> NoReturn:
    states.refuse()


_OPERATORS = (
    "getitem setitem len iter contains neg abs float array add radd sub rsub mul rmul truediv rtruediv floordiv mod pow"
    " matmul rmatmul lt le gt ge and or xor invert"
)
for _operator in _OPERATORS.split():
    setattr(NewStates, f"__{_operator}__", _refuse)


def refuse_gradients(*states: torch.Tensor | None) -> None:
    """Refuse gradients, which cannot pass through pages.

    Raises:
        UnsupportedError: backward or forward differentiation would go through these tensors.
    """
    given = [x for x in states if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise UnsupportedError(
            "SawCache: expected torch.no_grad() or torch.inference_mode() around the model, got Q, K, V or sinks that"
            " require a gradient: pages hold quantized numbers, through which no gradients flow. Train with"
            " use_cache=False"
        )
    if not torch.compiler.is_compiling() and _has_tangent(given):
        raise UnsupportedError(
            "SawCache: expected Q, K and V without tangents, got those of forward-mode differentiation: pages hold"
            " quantized numbers, through which no gradients flow. Differentiate with use_cache=False"
        )


def check_states(key_states: torch.Tensor, value_states: torch.Tensor) -> None:
    """Check new K and V.

    Raises:
        UnsupportedError: K and V differ in shape, have no data, or have a dtype that kernels do not take.
        LayoutError: there is no sequence.
    """
    if key_states.shape != value_states.shape:
        raise UnsupportedError(
            f"SawCache: expected K and V of one shape, got {list(key_states.shape)} and {list(value_states.shape)}"
        )
    if key_states.ndim != 4:
        raise UnsupportedError(f"SawCache: expected K and V of 4 dimensions, got {list(key_states.shape)}")
    if key_states.device != value_states.device or key_states.device.type == "meta":
        raise UnsupportedError(
            f"SawCache: expected K and V with data, on one device, got {key_states.device} and {value_states.device}"
        )
    if torch._C._get_tracing_state() is not None or get_proxy_mode() is not None:
        raise UnsupportedError(
            "SawCache: expected a model that runs, got one that torch.jit.trace or torch.fx records: a record holds"
            " the pages' content as constants. Use torch.compile, or use_cache=False"
        )
    if not (_has_data(key_states) and _has_data(value_states)):
        raise UnsupportedError(
            f"SawCache: expected K and V with data, got {type(key_states).__name__} without, as of torch.func, vmap or"
            " torch.export"
        )
    for states in (key_states, value_states):
        if states.dtype not in ops.FLOAT_DTYPES:
            raise UnsupportedError(f"SawCache: expected K and V in bfloat16, float16 or float32, got {states.dtype}")
    if key_states.shape[0] == 0:
        raise LayoutError("SawCache: expected at least one sequence, got a batch of 0")


def _has_tangent(states: Iterable[torch.Tensor]) -> bool:
    return any(forward_ad.unpack_dual(x).tangent is not None for x in states)  # type: ignore[no-untyped-call]


def _has_data(x: torch.Tensor) -> bool:
    try:
        return x.data_ptr() != 0 or x.numel() == 0
    except RuntimeError:  # what transforms and tracers wrap
        return False
