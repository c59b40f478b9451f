"""Records that commands write as JSON and read again. They are immutable, and types are checked when they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar, Self

import msgspec

from sawkv.errors import SawkvError
from sawkv.files import reason


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all records. `from_json` inverts `to_json`, for infinities and NaN too."""

    written_by: ClassVar[str] = "sawkv"
    """The command that writes such files, for error messages."""

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(msgspec.to_builtins(self), indent=indent) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse a record.

        Raises:
            SawkvError: the text is not JSON, a field is missing or unknown, or a value has another type. The message
                names the field.
        """
        try:
            return msgspec.convert(json.loads(text), type=cls)  # msgspec's own decoder refuses NaN and Infinity
        except (json.JSONDecodeError, RecursionError, msgspec.ValidationError) as error:
            raise SawkvError(
                f"expected a record of `{cls.written_by}`, got one that does not parse: {error}"
            ) from error

    @classmethod
    def read(cls, file: Path) -> Self:
        """The record in a file. Errors as of `from_json`, with the file's name, and where it cannot be read."""
        try:
            return cls.from_json(file.read_text(encoding="utf-8"))
        except SawkvError as error:
            raise SawkvError(f"{file}: {error}") from error
        except (OSError, ValueError) as error:
            raise SawkvError(
                f"{file}: expected a record of `{cls.written_by}`, got what cannot be read: {reason(error)}"
            ) from error


class AttentionShape(Record, frozen=True):
    """Layers, heads and head size of a model's attention. If layers differ, heads are those of the first."""

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
