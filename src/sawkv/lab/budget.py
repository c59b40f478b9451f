"""How much an evaluation measures."""

from __future__ import annotations

from sawkv.errors import SawkvError
from sawkv.records import Record


class Budget(Record, frozen=True):
    """What to measure.

    Attributes:
        tokens: of text to score, rounded to windows.
        window: tokens of a window.
        batch_tokens: tokens in one pass.
        layer_tokens: of text for the layer-by-layer part; 0 leaves it out.
        floor_tokens: of text for the noise floor.
        recall_lengths, recall_count: prompts of recall, `recall_count` of each task, length and depth; 0 leaves them
        out.
        free_runs: prompts to continue, and `free_run_tokens` tokens each; 0 leaves them out.
        stress: see `stress`; 1 is none.
        context: tokens of the longest request that would be served, over which what is learned must hold; 0 is what
            engines take, the model's own limit up to `corpus.LONGEST_CONTEXT`.
    """

    tokens: int = 65536
    window: int = 1024
    batch_tokens: int = 4096
    layer_tokens: int = 4096
    floor_tokens: int = 16384
    recall_lengths: tuple[int, ...] = (512, 2048)
    recall_count: int = 2
    free_runs: int = 16
    free_run_tokens: int = 128
    stress: int = 1
    context: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "window", "batch_tokens"):
            if getattr(self, name) < 1:
                raise SawkvError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.window < 32:
            raise SawkvError(f"window: expected at least 32 tokens, got {self.window}")
