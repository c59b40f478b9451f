"""The text that preparation runs a model on: prose, talk, code, tables and many scripts. It ships with sawkv; see
corpus/SOURCES.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Final

import torch

TEXT_VERSION: Final = 1
"""Changes with the text: what was fitted on another is fitted again."""
SEPARATOR: Final = "\n\n"
WINDOW: Final = 512
"""Tokens of a window that a model is prepared on."""
NUM_WINDOWS: Final = 8
LONGEST_CONTEXT: Final = 32768
"""Positions up to here are measured: with longer contexts windows would lie too far apart."""
FIRST_TOKENS: Final = 4
"""Of every window that stand at the start of the context: what models attend to from everywhere lies there."""


def preparation_text() -> str:
    """All of it, documents in an order that mixes their kinds."""
    folder = files("sawkv.prepare") / "corpus"
    kinds = [
        file.read_text(encoding="utf-8").split("\n====\n")
        for file in sorted(folder.iterdir(), key=lambda f: f.name)
        if file.name.endswith(".txt")
    ]
    documents = [
        (place / len(kind), number, text.strip("\n"))
        for number, kind in enumerate(kinds)
        for place, text in enumerate(kind)
    ]
    return SEPARATOR.join(text for *_, text in sorted(documents))


def preparation_windows(
    encode: Callable[[str], Sequence[int]], window: int, num_windows: int, prefix: Sequence[int] = ()
) -> torch.Tensor:
    """Token ids [num_windows, window] int64 on the CPU, taken evenly over the text; it is repeated where it is too
    short.

    Args:
        encode: text to token ids, without special tokens.
        window: tokens in a window.
        num_windows: how many.
        prefix: special tokens that the model wants first, such as BOS; each window starts with them.
    """
    ids = torch.tensor(list(encode(preparation_text())), dtype=torch.int64)
    size = window - len(prefix)
    spare = len(ids) - num_windows * size
    starts = (
        torch.linspace(0, spare, num_windows).long() + torch.arange(num_windows) * size
        if spare > 0
        else torch.arange(num_windows) * size
    )
    taken = ids[(starts[:, None] + torch.arange(size)) % len(ids)]
    return torch.cat([torch.tensor(list(prefix), dtype=torch.int64).expand(num_windows, -1), taken], 1)


def random_windows(vocab_size: int, window: int, num_windows: int) -> torch.Tensor:
    """The same shape for a model without a tokenizer: ids drawn from the vocabulary, always the same."""
    return torch.randint(0, vocab_size, (num_windows, window), generator=torch.Generator().manual_seed(0))


def preparation_positions(num_windows: int, window: int, context: int) -> torch.Tensor:
    """Where the tokens of windows stand: [num_windows, window] int64 on the CPU.

    Keys turn with their position, so what is learned of them at the first positions does not hold for later ones, and
    what is learned over a long context costs something in short ones. So windows are spread over the context as its
    octaves are: as many end between 1,024 and 2,048 as between 16,384 and 32,768. Only their first tokens stay at its
    start, since models give the start of a text a part of its own, and attend to it from everywhere (StreamingLLM,
    arXiv 2309.17453). To a model it looks as if the text between had been forgotten.
    """
    growth = max(1.0, context / window)
    ends = [window * growth ** (number / max(1, num_windows - 1)) for number in range(num_windows)]
    shifts = torch.tensor([round(end) - window for end in ends])
    places = torch.arange(window)
    return places + shifts[:, None] * (places >= FIRST_TOKENS)
