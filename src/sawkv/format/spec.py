"""Cache formats: a codec and two rotation orders, with a name that parses and prints. See docs/format.md.

`CacheFormat.parse` reads the name that a user gave, once. `CacheFormat.resolve` fits it to a head_dim. Code below that
point takes a `ResolvedFormat`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

from sawkv.errors import FormatError

FORMAT_VERSION: Final = 1
CODEC_BITS: Final = {"int2": 2, "int3": 3, "int4": 4, "int8": 8, "bf16": 16, "fp16": 16, "fp32": 32}
"""Bits of one element's code, by the codec of a row."""
QUANTIZED_CODECS: Final = frozenset({"int2", "int3", "int4", "int8"})
"""Codecs whose rows carry a scale and a zero point."""
FEEDBACK_CODECS: Final = frozenset({"int2", "int3", "int4"})
"""Codecs that take error feedback, and so need a model to be prepared."""
NARROWER_V: Final = {"int4v3": ("int4", "int3"), "int4v2": ("int4", "int2"), "int3v2": ("int3", "int2")}
"""Formats that store V in fewer bits than K, with the codecs of K and of V. All others have one codec for both."""
MIN_ROTATION_ORDER: Final = 16
MAX_DEFAULT_ROTATION_ORDER: Final = 128
MAX_ROW_DIM: Final = 256
"""Channels of a row, which has one scale and one zero point. Wider heads are stored as several rows."""
HEAD_DIMS: Final = (*range(16, MAX_ROW_DIM + 1, 16), 2 * MAX_ROW_DIM)
COMMON_HEAD_DIM: Final = 128
"""That of most models, for figures and checks without one."""

RECENT_COUNTS: Final = range(0, 1000, 16)
"""How many of the newest tokens may be kept in 16 bits."""

_NAME = re.compile(
    r"(?P<codec>[a-z]+[0-9]{1,2}(?:v[0-9])?)(?:-k(?P<k>[0-9]{1,9})-v(?P<v>[0-9]{1,9}))?(?:-r(?P<r>[0-9]{1,9}))?",
    re.ASCII,
)


@dataclass(frozen=True, eq=False)
class CacheFormat:
    """How rows of K and V become bytes, as a user names it. The head_dim is not known yet.

    Attributes:
        codec: one of `CODEC_BITS` for K and V alike, or one of `NARROWER_V`.
        k_rotation_order, v_rotation_order: channels per Hadamard block; 0 turns rotation off; None takes the default
            for the head_dim.
        recent: the newest tokens of a sequence that queries read as the model made them, beside the pages; 0 is none.
            The pages hold these tokens too, so their bytes do not depend on it.

    Raises:
        FormatError: a value is out of range.
    """

    codec: str
    k_rotation_order: int | None = None
    v_rotation_order: int | None = None
    recent: int = 0

    def __post_init__(self) -> None:
        if self.codec not in (*CODEC_BITS, *NARROWER_V):
            known = ", ".join((*CODEC_BITS, *NARROWER_V))
            raise FormatError(f"unknown codec: expected one of {known}, got {self.codec!r}")
        if (self.k_rotation_order is None) != (self.v_rotation_order is None):
            raise FormatError("expected rotation orders for both K and V, or for neither")
        for order in (self.k_rotation_order, self.v_rotation_order):
            if order and (order < MIN_ROTATION_ORDER or order & (order - 1)):
                raise FormatError(
                    f"rotation order: expected 0 or a power of two from {MIN_ROTATION_ORDER}, got {order}"
                )
        if self.recent not in RECENT_COUNTS:
            raise FormatError(
                f"newest tokens: expected a multiple of {RECENT_COUNTS.step} below {RECENT_COUNTS.stop}, got"
                f" {self.recent}"
            )

    @classmethod
    def parse(cls, name: str) -> CacheFormat:
        """The format that `name` says, for example `int4-k128-v128`, or `int4` for the default orders. `-r64` at its
        end keeps the newest 64 tokens.

        Raises:
            FormatError: the name is not one.
        """
        match = _NAME.fullmatch(name) if isinstance(name, str) else None
        if match is None:
            raise FormatError(f"format name: expected one such as int4 or int4-k128-v128, got {name!r:.80}")
        k, v = match["k"], match["v"]
        return cls(match["codec"], None if k is None else int(k), None if v is None else int(v), int(match["r"] or 0))

    def __eq__(self, other: object) -> bool:
        """Equal names are equal formats, resolved or not."""
        return isinstance(other, CacheFormat) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[str, int | None, int | None, int]:
        return self.codec, self.k_rotation_order, self.v_rotation_order, self.recent

    def __str__(self) -> str:
        orders = "" if self.k_rotation_order is None else f"-k{self.k_rotation_order}-v{self.v_rotation_order}"
        return f"{self.codec}{orders}{f'-r{self.recent}' if self.recent else ''}"

    @property
    def k_codec(self) -> str:
        """The codec of rows of K, one of `CODEC_BITS`."""
        return NARROWER_V.get(self.codec, (self.codec, self.codec))[0]

    @property
    def v_codec(self) -> str:
        """The codec of rows of V, one of `CODEC_BITS`. It has at most the bits of K's."""
        return NARROWER_V.get(self.codec, (self.codec, self.codec))[1]

    @property
    def quantized(self) -> bool:
        """Whether rows carry a scale and a zero point."""
        return self.k_codec in QUANTIZED_CODECS

    @property
    def feeds_back(self) -> bool:
        """Whether rows may be written with error feedback."""
        return self.k_codec in FEEDBACK_CODECS

    def resolve(self, head_dim: int) -> ResolvedFormat:
        """The format of the pages: default rotation orders are filled in and checked against `head_dim`.

        Raises:
            FormatError: head_dim is not one of `HEAD_DIMS`, or an order does not divide the channels of a row.
        """
        if head_dim not in HEAD_DIMS:
            raise FormatError(f"head_dim: expected a multiple of 16 from 16 to 256, or 512, got {head_dim}")
        row_dim = min(head_dim, MAX_ROW_DIM)
        default = min(row_dim & -row_dim, MAX_DEFAULT_ROTATION_ORDER) if self.quantized else 0
        k, v = (default if order is None else order for order in (self.k_rotation_order, self.v_rotation_order))
        for kind, order in (("K", k), ("V", v)):
            if order and row_dim % order:
                of = f"head_dim {head_dim}" if row_dim == head_dim else f"{row_dim}, half of head_dim {head_dim}"
                raise FormatError(f"{kind} rotation order: expected a divisor of {of}, got {order}")
        for kind, codec in (("K", self.k_codec), ("V", self.v_codec)):
            if row_dim * CODEC_BITS[codec] % 32:
                raise FormatError(f"{kind} in {codec}: expected a head_dim that is a multiple of 32, got {head_dim}")
        return ResolvedFormat(self.codec, k, v)


@dataclass(frozen=True, eq=False)
class ResolvedFormat(CacheFormat):
    """A `CacheFormat` whose rotation orders are known and divide a row's channels. `CacheFormat.resolve` makes it."""

    k_rotation_order: int = field()
    v_rotation_order: int = field()
