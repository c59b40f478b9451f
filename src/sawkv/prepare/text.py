"""Text to windows of tokens: those to be scored, and those to calibrate on, which are others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sawkv.errors import SawkvError
from sawkv.prepare.model import load_tokenizer

Encode = Callable[[str], list[int]]
"""Text to token ids, without special tokens."""

HELD_OUT = "held_out.npy"
"""Token ids that a model of this project keeps beside its weights: text it was not trained on."""


@dataclass(frozen=True)
class Text:
    """A model's tokenizer, and one text in its tokens.

    Attributes:
        name: of the file.
        ids: [num_tokens] int64.
        prefix: what the tokenizer starts every sequence with.
        encode: text to ids, without special tokens.
    """

    name: str
    ids: torch.Tensor
    prefix: tuple[int, ...]
    encode: Encode

    def split(self, window: int, num_windows: int, num_calibration: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows to score, from the start of the text, and windows to calibrate on, from its end: [at most num_windows, window] each.

        Raises:
            SawkvError: the text is too short for one of each.
        """
        size = window - len(self.prefix)
        available = len(self.ids) // max(1, size)
        if size < 2 or available < 2:
            raise SawkvError(
                f"text: expected at least {2 * max(size, 2)} tokens for windows of {window}, got {len(self.ids)} in {self.name}"
            )
        calibrating = min(num_calibration, max(1, available // 4))
        scored = min(num_windows, available - calibrating)
        return self._windows(self.ids[: scored * size], size), self._windows(self.ids[-calibrating * size :], size)

    def _windows(self, ids: torch.Tensor, size: int) -> torch.Tensor:
        rows = ids.view(-1, size)
        return torch.cat([torch.tensor(self.prefix, dtype=torch.int64).expand(len(rows), -1), rows], 1)


def load_text(model: Path, file: Path | None) -> Text:
    """The text in `file`, UTF-8, in the tokens of the model; None for the model's own held-out text.

    Raises:
        SawkvError: there is no such text, or it does not decode.
    """
    tokenizer = load_tokenizer(model)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    special: Sequence[int] = tokenizer("")["input_ids"]
    prefix = tuple(token for token in special if token != tokenizer.eos_token_id)
    if file is None:
        held_out = model / HELD_OUT
        if not held_out.is_file():
            raise SawkvError(f"text: expected --text FILE, since {model} holds no {HELD_OUT}; got none")
        return Text("held-out", torch.from_numpy(np.load(held_out).astype(np.int64)), prefix, encode)
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SawkvError(f"text: expected a UTF-8 file, got {file}: {error}") from error
    return Text(file.name, torch.tensor(encode(content), dtype=torch.int64), prefix, encode)
