"""The pages of one attention layer, and the tensors with which they are written and read."""

from __future__ import annotations

import hashlib
from copy import copy
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

import torch

from sawkv.errors import LayoutError
from sawkv.format.constants import BUCKET_SIZE
from sawkv.format.counters import COLUMNS
from sawkv.format.feedback import Feedback
from sawkv.format.layout import PageLayout
from sawkv.format.rotation import rotate
from sawkv.format.spec import FORMAT_VERSION


class Constants(NamedTuple):
    """The static tensors of K or of V of one layer, as kernels take them. A field is None if the cache does not have
    it.

    Attributes:
        center: [num_buckets, num_kv_heads, head_dim] fp32. V has one bucket.
        gain: [num_kv_heads, head_dim] fp32.
        gain_inverse: [num_kv_heads, head_dim] fp32, 1 / gain, rounded once. Readers use it in place of the gain.
        weights: [num_kv_heads, head_dim, head_dim] int8, of the feedback.
        step: [num_kv_heads] fp32, of the feedback.
    """

    center: torch.Tensor | None
    gain: torch.Tensor | None
    gain_inverse: torch.Tensor | None
    weights: torch.Tensor | None
    step: torch.Tensor | None


@dataclass(frozen=True)
class PagedKVCache:
    """The pages of one layer, with their layout and static tensors.

    Attributes:
        pages: [num_pages, num_kv_heads * parts, page_size, token_bytes] uint8. The stride between pages is free; a page
            is contiguous. Kernels write to it.
        layout: offsets and sizes within a page.
        k_center, v_center: [num_kv_heads, head_dim] fp32, or None. `append` subtracts them before rotation. Attention
            adds V's to the output. Without K's center all scores of one query change by the same q.k_center, which
            attention adds where the softmax notices: under a soft-cap, with sinks, and in the log-sum-exp.
            K may have several, [num_buckets, num_kv_heads, head_dim]: bucket i holds positions from i * BUCKET_SIZE on,
            and the last one all later positions. Attention then adds q.k_center to every score.
        k_gain, v_gain: [num_kv_heads, head_dim] fp32, positive and finite, or None. `append` multiplies by them after
            centering and before rotation. Attention divides Q by K's gain, and the output by V's. Values are checked on
            the CPU alone, where that does not synchronize.
        k_feedback, v_feedback: how `append` passes rounding errors on to later channels, or None. Its heads are those
            of `layout.rows`. Only formats below 8 bits have feedback. It does not change how pages are read.
        counters: [2, 6] fp64 from `counters.new_counters`, or None. `append` updates it.
        constants: the static tensors of K and those of V, computed once from the fields above.
        bound: kernels that `sawkv.ops` has bound to these pages. Copies of the cache start without any.

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
    _k_shift: list[torch.Tensor] = field(init=False, repr=False, compare=False, default_factory=list)
    bound: dict[object, object] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._check_pages()
        for name in ("k_center", "v_center", "k_gain", "v_gain"):
            self._check_vectors(name, getattr(self, name))
        for name in ("k_feedback", "v_feedback"):
            self._check_feedback(name, getattr(self, name))
        self._check_counters()
        constants = (
            _constants(self.k_center, self.k_gain, self.k_feedback),
            _constants(self.v_center, self.v_gain, self.v_feedback),
        )
        object.__setattr__(self, "constants", constants)

    def _check_pages(self) -> None:
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

    def _check_vectors(self, name: str, vectors: torch.Tensor | None) -> None:
        """Check centers or gains of K or V."""
        if vectors is None:
            return
        expected, device = (self.layout.num_kv_heads, self.layout.head_dim), self.pages.device
        rows = vectors[0] if name == "k_center" and vectors.ndim == 3 and len(vectors) else vectors
        if rows.shape != expected or vectors.dtype != torch.float32 or not vectors.is_contiguous():
            raise LayoutError(
                f"{name}: expected contiguous float32 {list(expected)}, got {vectors.dtype} {list(vectors.shape)}"
            )
        if vectors.device != device:
            raise LayoutError(f"{name}: expected device {device}, got {vectors.device}")
        is_read = name.endswith("gain") and device.type == "cpu"
        if is_read and not bool(((vectors > 0) & (vectors < torch.inf)).all()):
            raise LayoutError(f"{name}: expected positive and finite values, got others")

    def _check_feedback(self, name: str, feedback: Feedback | None) -> None:
        if feedback is None:
            return
        rows, device = self.layout.rows, self.pages.device
        if not self.layout.format.feeds_back:
            raise LayoutError(f"{name}: expected a format below 8 bits, got {self.layout.format}")
        square = (rows.num_kv_heads, rows.head_dim, rows.head_dim)
        if feedback.weights.shape != square or feedback.weights.device != device:
            raise LayoutError(
                f"{name}: expected weights {list(square)} on {device}, "
                f"got {list(feedback.weights.shape)} on {feedback.weights.device}"
            )

    def _check_counters(self) -> None:
        counters, device = self.counters, self.pages.device
        if counters is None:
            return
        fits = counters.shape == (2, len(COLUMNS)) and counters.dtype == torch.float64 and counters.is_contiguous()
        if not fits or counters.device != device:
            raise LayoutError(
                f"counters: expected contiguous float64 [2, {len(COLUMNS)}] on {device}, "
                f"got {counters.dtype} {list(counters.shape)} on {counters.device}"
            )

    @classmethod
    def allocate(
        cls,
        layout: PageLayout,
        num_pages: int,
        device: torch.device | str = "cpu",
        **constants: Any,
    ) -> PagedKVCache:
        """Make a cache with `num_pages` uninitialized pages. `constants` are fields of the class, by name."""
        return cls(torch.empty(layout.pages_shape(num_pages), dtype=torch.uint8, device=device), layout, **constants)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out bound kernels: they hold the addresses of this object's tensors."""
        return vars(self) | {"bound": {}}

    def rows(self) -> PagedKVCache:
        """The same tensors with `layout.rows`, for what writes and reads rows and knows of no parts."""
        layout = self.layout.rows
        if layout is self.layout:
            return self

        def seen(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.view(*x.shape[:-2], layout.num_kv_heads, layout.head_dim)

        constants = tuple(
            part._replace(center=seen(part.center), gain=seen(part.gain), gain_inverse=seen(part.gain_inverse))
            for part in self.constants
        )
        k, v = constants
        rows = copy(self)
        centers = {"k_center": seen(self.k_center), "v_center": seen(self.v_center)}
        vars(rows).update(layout=layout, constants=constants, **centers, k_gain=k.gain, v_gain=v.gain)
        return rows

    def refresh(self) -> None:
        """Recompute what follows from gains and centers, in place. Call it after changing them in place."""
        for constants in self.constants:
            if constants.gain is not None and constants.gain_inverse is not None:
                torch.reciprocal(constants.gain, out=constants.gain_inverse)
        for shift in self._k_shift:
            shift.copy_(self._find_k_shift().view_as(shift))

    def added_by_gather(self, rotated: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What `gather` adds to rows of K, by bucket, and to those of V: [num_buckets, num_kv_heads, head_dim] fp32 as
        in `constants`, None for nothing. To rows that stay rotated it adds what makes all of them lack the center of
        the first bucket.
        """
        if not rotated:
            return self.constants[0].center, self.constants[1].center
        if self.num_buckets == 1:
            return None, None
        if not self._k_shift:
            self._k_shift.append(self._find_k_shift())
        return self._k_shift[0].view(-1, self.layout.num_kv_heads, self.layout.head_dim), None

    def _find_k_shift(self) -> torch.Tensor:
        """How centers of K differ from the first one, as rows are stored: scaled and rotated."""
        center, gain = self.constants[0].center, self.constants[0].gain
        assert center is not None
        shift = center - center[0]
        return rotate(shift if gain is None else shift * gain, self.layout.k_rotation_order)

    def bucket_of(self, positions: torch.Tensor) -> torch.Tensor:
        """The bucket of each position, int64 of the same shape."""
        return (positions.long() // BUCKET_SIZE).clamp(0, self.num_buckets - 1)

    @property
    def num_buckets(self) -> int:
        """Buckets of positions that have a center of K; 1 without any."""
        center = self.constants[0].center
        return 1 if center is None else len(center)

    @property
    def num_slots(self) -> int:
        """Number of tokens that the pages can hold."""
        return self.pages.shape[0] * self.layout.page_size

    def fingerprint(self) -> str:
        """Hash everything that changes the stored bytes. Caches may exchange pages only if their fingerprints are
        equal.

        Returns:
            16 hex digits.
        """
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
    buckets = None if center is None else center.view(-1, *center.shape[-2:])
    inverse = None if gain is None else gain.reciprocal()
    return Constants(buckets, gain, inverse, *((None, None) if feedback is None else (feedback.weights, feedback.step)))


def _digest(x: torch.Tensor | None) -> str:
    return "-" if x is None else hashlib.sha256(x.cpu().numpy().tobytes()).hexdigest()
