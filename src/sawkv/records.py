"""Records that commands write as JSON and read again: frozen, and with every type checked when they are read."""

from __future__ import annotations

import json
from typing import ClassVar, Self

import msgspec

from sawkv.errors import SawkvError


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all records. `to_json` and `from_json` are inverse; infinities and NaN pass through them."""

    written_by: ClassVar[str] = "sawkv"
    """The command that writes such files, for messages."""

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(msgspec.to_builtins(self), indent=indent) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The record in a text.

        Raises:
            SawkvError: it is no JSON, lacks a field, has one too many, or a value has another type. The message names
                the field.
        """
        try:
            return msgspec.convert(json.loads(text), type=cls)  # msgspec's own decoder refuses NaN and Infinity
        except (json.JSONDecodeError, RecursionError, msgspec.ValidationError) as error:
            raise SawkvError(
                f"expected a record of `{cls.written_by}`, got one that does not parse: {error}"
            ) from error


class AttentionShape(Record, frozen=True):
    """Layers, heads and head size of a model's attention. Where layers differ, the heads are those of the first."""

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
