"""The pages of one attention layer, with all that is needed to read and write them."""

from __future__ import annotations

import hashlib
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

import torch

from sawkv.errors import LayoutError
from sawkv.format.counters import COLUMNS
from sawkv.format.feedback import Feedback
from sawkv.format.layout import PageLayout
from sawkv.format.spec import FORMAT_VERSION


class Constants(NamedTuple):
    """What K or V of a layer is written and read with, as kernels take it; None where there is nothing.

    Attributes:
        center, gain: [num_kv_heads, head_dim] fp32.
        gain_inverse: [num_kv_heads, head_dim] fp32, 1 / gain rounded once. All that readers know of the gain.
        weights, step: of the feedback.
    """

    center: torch.Tensor | None
    gain: torch.Tensor | None
    gain_inverse: torch.Tensor | None
    weights: torch.Tensor | None
    step: torch.Tensor | None


@dataclass(frozen=True)
class PagedKVCache:
    """One layer's pages.

    Attributes:
        pages: [num_pages, num_kv_heads, page_size, token_bytes] uint8. Only the stride of pages is free. Kernels mutate
            it.
        layout: what the bytes mean.
        k_center, v_center: [num_kv_heads, head_dim] fp32 static offsets, subtracted before rotation, or None. Without
        K's, every score
            of a query lacks the same q.c; attention adds it where that matters. V's is added back to the output.
        k_gain, v_gain: [num_kv_heads, head_dim] fp32 static factors, positive and finite (checked on the CPU, where
        that waits for
            nothing), by which channels are multiplied after centering and before rotation, or None. Readers divide by
            them: attention divides q by K's and the output by V's.
        k_feedback, v_feedback: how `append` passes on the errors of codes, or None. For int4 alone; readers need not
        know of it.
        counters: [2, 6] fp64, from `counters.new_counters`, which `append` updates; None counts nothing.
        constants: all that K is written and read with, and all that V is. Made here, so that readers compute nothing
            again.
        bound: what `sawkv.ops` keeps with this cache: kernels bound to its pages. Copies have none.

    Raises:
        LayoutError: a tensor does not fit the layout.
    """

    pages: torch.Tensor
    layout: PageLayout
    _: KW_ONLY
    k_center: torch.Tensor | None = None
    v_center: torch.Tensor | None = None
    k_gain: torch.Tensor | None = None
    v_gain: torch.Tensor | None = None
    k_feedback: Feedback | None = None
    v_feedback: Feedback | None = None
    counters: torch.Tensor | None = None
    constants: tuple[Constants, Constants] = field(init=False, repr=False)
    bound: dict[object, object] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        layout, pages = self.layout, self.pages
        shape = layout.pages_shape(pages.shape[0] if pages.ndim else 0)
        if pages.dtype != torch.uint8 or pages.shape != shape:
            raise LayoutError(f"pages: expected uint8 {list(shape)}, got {pages.dtype} {list(pages.shape)}")
        strides = (layout.span_bytes, layout.token_bytes, 1)
        if pages.stride()[1:] != strides or pages.stride(0) % 16 or pages.data_ptr() % 16:
            raise LayoutError(
                f"pages: expected strides [multiple of 16, {', '.join(map(str, strides))}] from a 16-byte aligned"
                f" address, got {list(pages.stride())}"
            )
        for name in ("k_center", "v_center", "k_gain", "v_gain"):
            vectors: torch.Tensor | None = getattr(self, name)
            if vectors is None:
                continue
            expected = (layout.num_kv_heads, layout.head_dim)
            if vectors.shape != expected or vectors.dtype != torch.float32 or not vectors.is_contiguous():
                raise LayoutError(
                    f"{name}: expected contiguous float32 {list(expected)}, got {vectors.dtype} {list(vectors.shape)}"
                )
            if vectors.device != pages.device:
                raise LayoutError(f"{name}: expected device {pages.device}, got {vectors.device}")
            if (
                name.endswith("gain")
                and vectors.device.type == "cpu"
                and not bool(((vectors > 0) & (vectors < torch.inf)).all())
            ):
                raise LayoutError(f"{name}: expected positive and finite values, got others")
        for name, feedback in (("k_feedback", self.k_feedback), ("v_feedback", self.v_feedback)):
            if feedback is None:
                continue
            if layout.format.codec != "int4":
                raise LayoutError(f"{name}: expected an int4 format, got {layout.format}")
            square = (layout.num_kv_heads, layout.head_dim, layout.head_dim)
            if feedback.weights.shape != square or feedback.weights.device != pages.device:
                raise LayoutError(
                    f"{name}: expected weights {list(square)} on {pages.device}, "
                    f"got {list(feedback.weights.shape)} on {feedback.weights.device}"
                )
        if (counters := self.counters) is not None:
            fits = counters.shape == (2, len(COLUMNS)) and counters.dtype == torch.float64 and counters.is_contiguous()
            if not fits or counters.device != pages.device:
                raise LayoutError(
                    f"counters: expected contiguous float64 [2, {len(COLUMNS)}] on {pages.device}, "
                    f"got {counters.dtype} {list(counters.shape)} on {counters.device}"
                )
        constants = (
            _constants(self.k_center, self.k_gain, self.k_feedback),
            _constants(self.v_center, self.v_gain, self.v_feedback),
        )
        object.__setattr__(self, "constants", constants)

    @classmethod
    def allocate(
        cls,
        layout: PageLayout,
        num_pages: int,
        device: torch.device | str = "cpu",
        **constants: Any,
    ) -> PagedKVCache:
        """A cache with `num_pages` fresh pages, their bytes not initialized. `constants` are fields, by their names."""
        return cls(torch.empty(layout.pages_shape(num_pages), dtype=torch.uint8, device=device), layout, **constants)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: kernels are bound to the addresses of these tensors."""
        return vars(self) | {"bound": {}}

    def refresh(self) -> None:
        """Make what follows from the gains again, in place: call it when they were changed in place."""
        for constants in self.constants:
            if constants.gain is not None and constants.gain_inverse is not None:
                torch.reciprocal(constants.gain, out=constants.gain_inverse)

    @property
    def num_slots(self) -> int:
        """Tokens that the pages can hold."""
        return self.pages.shape[0] * self.layout.page_size

    def fingerprint(self) -> str:
        """16 hex digits over everything that changes the bytes; caches may exchange pages only if theirs are equal."""
        layout, (k, v) = self.layout, self.constants
        present = {
            "k_gain": k.gain,
            "v_gain": v.gain,
            "k_feedback": k.weights,
            "k_step": k.step,
            "v_feedback": v.weights,
            "v_step": v.step,
        }
        parts = [
            f"sawkv/{FORMAT_VERSION}",
            str(layout.format),
            f"head_dim={layout.head_dim}",
            f"page_size={layout.page_size}",
            f"k_center={_digest(self.k_center)}",
            f"v_center={_digest(self.v_center)}",
            *(f"{name}={_digest(x)}" for name, x in present.items() if x is not None),
        ]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def _constants(center: torch.Tensor | None, gain: torch.Tensor | None, feedback: Feedback | None) -> Constants:
    inverse = None if gain is None else gain.reciprocal()
    return Constants(center, gain, inverse, *((None, None) if feedback is None else (feedback.weights, feedback.step)))


def _digest(x: torch.Tensor | None) -> str:
    return "-" if x is None else hashlib.sha256(x.cpu().numpy().tobytes()).hexdigest()
