"""How much an evaluation measures."""

from __future__ import annotations

from dataclasses import dataclass

from sawkv.errors import SawkvError


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        tokens: of text to score, rounded to windows.
        window: tokens of a window.
        calibration_tokens: of other text, for methods that learn.
        batch_tokens: tokens in one pass.
        layer_tokens: of text for the layer-by-layer part; 0 leaves it out.
        floor_tokens: of text for the noise floor.
        recall_lengths, recall_count: prompts of recall, `recall_count` of each task, length and depth; 0 leaves them out.
        free_runs: prompts to continue, and `free_run_tokens` tokens each; 0 leaves them out.
        stress: see `stress`; 1 is none.
    """

    tokens: int = 65536
    window: int = 1024
    calibration_tokens: int = 8192
    batch_tokens: int = 4096
    layer_tokens: int = 4096
    floor_tokens: int = 16384
    recall_lengths: tuple[int, ...] = (512, 2048)
    recall_count: int = 2
    free_runs: int = 16
    free_run_tokens: int = 128
    stress: int = 1

    def __post_init__(self) -> None:
        for name in ("tokens", "window", "calibration_tokens", "batch_tokens"):
            if getattr(self, name) < 1:
                raise SawkvError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.window < 32:
            raise SawkvError(f"window: expected at least 32 tokens, got {self.window}")

    @property
    def context(self) -> int:
        """Tokens of the longest sequence that is read: what is learned must hold at all of its positions."""
        return max([self.window, *(self.recall_lengths if self.recall_count else ())])
