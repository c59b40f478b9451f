"""Text as windows of tokens: windows to score, and other windows to calibrate on."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from sawkv.errors import SawkvError
from sawkv.files import reason
from sawkv.prepare.corpus import preparation_text, tokens_before
from sawkv.prepare.model import EvalModel, load_tokenizer

Encode = Callable[[str], list[int]]
"""Maps text to token ids, without special tokens."""

HELD_OUT = "held_out.npz"
"""Token ids that a model of this project keeps beside its weights, of text that it was not trained on."""


@dataclass(frozen=True)
class Text:
    """One text in the tokens of a model, and the model's tokenizer.

    Attributes:
        name: of the file.
        ids: [num_tokens] int64.
        prefix: special tokens with which the tokenizer starts every sequence.
        encode: text to ids, without special tokens.
    """

    name: str
    ids: torch.Tensor
    prefix: tuple[int, ...]
    encode: Encode

    def split(self, window: int, num_windows: int, num_calibration: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows to score, from the start of the text, and windows to calibrate on, from its end: each [at most the
        number asked for, window].

        Raises:
            SawkvError: the text is too short for one of each.
        """
        size = window - len(self.prefix)
        available = len(self.ids) // max(1, size)
        if size < 2 or available < 2:
            raise SawkvError(
                f"--text: expected at least {2 * max(size, 2)} tokens for windows of {window}, got {len(self.ids)} in"
                f" {self.name}"
            )
        calibrating = min(num_calibration, max(1, available // 4))
        scored = min(num_windows, available - calibrating)
        return self._windows(self.ids[: scored * size], size), self._windows(self.ids[-calibrating * size :], size)

    def windows(self, window: int, num_windows: int) -> torch.Tensor:
        """Windows from the start of the text, [at most num_windows, window]. Says on stderr if there are fewer.

        Raises:
            SawkvError: the text is too short for one.
        """
        size = window - len(self.prefix)
        if size < 2 or len(self.ids) < size:
            raise SawkvError(
                f"--text: expected at least {max(size, 2)} tokens for a window of {window}, got {len(self.ids)} in"
                f" {self.name}"
            )
        if (available := len(self.ids) // size) < num_windows:
            print(
                f"sawkv: {self.name} has {len(self.ids):,} tokens: {available:,} windows of {window:,} are read, of"
                f" {num_windows:,} asked for",
                file=sys.stderr,
            )
        return self._windows(self.ids[: min(num_windows, available) * size], size)

    def _windows(self, ids: torch.Tensor, size: int) -> torch.Tensor:
        rows = ids.view(-1, size)
        return torch.cat([torch.tensor(self.prefix, dtype=torch.int64).expand(len(rows), -1), rows], 1)


BOS_GAIN = 0.2
"""Nats per token by which BOS must raise the likelihood of text, before BOS is added against the tokenizer's own rule.
"""
BOS_TOKENS = 512
"""Tokens of the text on which this is tried."""


def with_bos(text: Text, model: EvalModel) -> Text:
    """Put BOS before every window, if the model needs it and its tokenizer does not add it. Says so on stderr.

    A checkpoint can lose its BOS. Gemma 3 does when Transformers reads it from a GGUF file; its perplexity is then
    several times as high, and measurements mean nothing. Other tokenizers, as Qwen's, name a BOS and never add it, on
    purpose. So the model decides: BOS is added if text becomes clearly likelier.
    """
    bos = getattr(model.model.config.get_text_config(), "bos_token_id", None)
    ids = text.ids[: min(BOS_TOKENS, model.max_positions - 1)][None]  # BOS comes before them
    if not isinstance(bos, int) or bos in text.prefix or ids.shape[1] < 2:
        return text
    following = ids[0, 1:].to(model.device)
    losses = [
        float(F.cross_entropy(model.logits(model.hidden(row)[0, -len(following) - 1 : -1]), following))
        for row in (ids, torch.cat([torch.tensor([[bos]]), ids], 1))
    ]
    if not losses[0] - losses[1] > BOS_GAIN:
        return text
    without, after = (math.exp(loss) for loss in losses)
    print(
        f"sawkv: the tokenizer adds no BOS, and the model needs one: perplexity {without:.1f} without it, {after:.1f}"
        " after it. It is put first in every window; servers need it too (add_bos_token in tokenizer_config.json).",
        file=sys.stderr,
    )
    return replace(text, prefix=(bos, *text.prefix))


def load_encoder(model: Path) -> tuple[Encode, tuple[int, ...]]:
    """A model's encoder, and the special tokens with which its tokenizer starts every sequence."""
    tokenizer = load_tokenizer(model)

    def encode(text: str, special: bool = False) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    if not encode("a"):  # Transformers makes an empty tokenizer for a folder that holds none
        raise SawkvError(f"model: expected a checkpoint with a tokenizer, got none in {model}")
    return encode, tuple(tokens_before(encode, functools.partial(encode, special=True)))


def shipped_text(model: Path) -> Text:
    """The text that ships with sawkv, which engines prepare models on."""
    encode, prefix = load_encoder(model)
    return Text("the text of sawkv", torch.tensor(encode(preparation_text()), dtype=torch.int64), prefix, encode)


def load_text(model: Path, file: Path | None) -> Text:
    """The text in `file` (UTF-8) in the model's tokens; None is the model's own held-out text.

    Raises:
        SawkvError: there is no such text, or it does not decode.
    """
    encode, prefix = load_encoder(model)
    if file is None:
        held_out = model / HELD_OUT
        if not held_out.is_file():
            raise SawkvError(f"--text: expected a file, since {model} holds no {HELD_OUT}; got none")
        return Text("held-out", torch.from_numpy(np.load(held_out)["tokens"].astype(np.int64)), prefix, encode)
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SawkvError(f"--text: expected a UTF-8 file, got {file}: {reason(error)}") from error
    return Text(file.name, torch.tensor(encode(content), dtype=torch.int64), prefix, encode)
