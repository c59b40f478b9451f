"""How much text an evaluation reads."""

from __future__ import annotations

from sawkv.errors import SawkvError
from sawkv.records import Record


def check_window(window: int) -> None:
    """Refuse windows in which there is little to measure.

    Raises:
        SawkvError: this one is so short.
    """
    if window < 32:
        raise SawkvError(f"--window: expected at least 32 tokens, got {window}")


class Budget(Record, frozen=True):
    """Amounts that an evaluation measures.

    Attributes:
        tokens: text to score, rounded up to windows.
        window: tokens per window.
        batch_tokens: tokens per pass of the model.
        layer_tokens: text for the measurement layer by layer; 0 leaves it out.
        floor_tokens: text for the noise floor; 0 leaves it out.
        recall_lengths, recall_count: lengths of recall prompts, and prompts per task, length and depth; 0 leaves them
            out.
        free_runs, free_run_tokens: prompts to continue, and tokens of each continuation; 0 leaves them out.
        stress: see `stress.apply_stress`; 1 is none.
        context: tokens of the longest request that will be served. Calibrations are fitted over this context. 0 is the
            engines' choice: the model's limit, at most `corpus.LONGEST_CONTEXT`.
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
                raise SawkvError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(self, name)}")
        check_window(self.window)
