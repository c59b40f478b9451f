"""Which layers a forward pass has reached. A pass that dies between layers leaves its tokens in some of them: no use
may overlook that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sawkv.errors import LayoutError, SawkvError


@dataclass(eq=False)
class Passes:
    """The forward passes over one cache.

    A pass begins at the layer that began the first one, and brings the same number of tokens to each layer once.

    Attributes:
        number: of passes begun.
        num_new: tokens that the last one brings to each sequence.
        done: the last pass that each layer has finished, by the layer's index.
        broken: what stopped half way and cannot be taken back; empty if nothing did.
    """

    number: int = 0
    num_new: int = 0
    done: dict[int, int] = field(default_factory=dict)
    broken: str = ""
    _first: int | None = None

    def enter(self, index: int, num_new: int) -> None:
        """Ask whether this layer may take part in the pass that runs, or begin one. Changes nothing.

        Raises:
            LayoutError: layers do not hold the same tokens, or would not.
        """
        self.check_usable()
        if self._begins(index):
            self.check_whole()
        elif self.done.get(index, 0) != self.number - 1:
            raise LayoutError(
                f"SawCache: expected layer {index} once in each forward pass, got it twice, or not in an earlier pass."
                f" {WAYS_OUT}"
            )
        elif num_new != self.num_new:
            raise LayoutError(
                f"SawCache: expected {self.num_new} new tokens in layer {index}, as in the layers before, got {num_new}"
            )

    def begin(self, index: int, num_new: int) -> None:
        """Layer `index` has entered, and there is room for its tokens."""
        if self._begins(index):
            self._first, self.num_new = index, num_new
            self.number += 1
        self.done.setdefault(index, self.number - 1)

    def finish(self, index: int) -> None:
        """Layer `index` has written its tokens, and attended."""
        self.done[index] = self.number

    @contextmanager
    def changing(self, what: str) -> Iterator[None]:
        """Around a change of all layers: refusals come before it, anything else that stops it leaves the cache
        `broken`.
        """
        try:
            yield
        except SawkvError:
            raise
        except BaseException:
            self.broken = what
            raise

    @property
    def unfinished(self) -> bool:
        """Whether the last pass is not in all layers."""
        return any(number != self.number for number in self.done.values())

    def check_usable(self) -> None:
        """
        Raises:
            LayoutError: an earlier call stopped half way.
        """
        if self.broken:
            raise LayoutError(f"SawCache: {self.broken} stopped half way, so its layers are unlike. {WAYS_OUT}")

    def check_whole(self, taken_back: int = 0) -> None:
        """For what needs all layers to hold the same tokens, once the last `taken_back` of them are gone.

        Raises:
            LayoutError: the last pass is not in all layers.
        """
        self.check_usable()
        if self.unfinished and taken_back < self.num_new:
            reached = sum(number == self.number for number in self.done.values())
            raise LayoutError(
                f"SawCache: the last forward pass ended in {reached} of {len(self.done)} layers. Take back its"
                f" {self.num_new} tokens by cache.crop({-self.num_new}), or all by cache.reset()"
            )

    def take_back(self, is_empty: bool) -> None:
        """The last pass is gone from all layers. `is_empty`: every other too."""
        if is_empty:
            self.number, self.done, self._first = 0, {}, None
        self.done = dict.fromkeys(self.done, self.number)

    def _begins(self, index: int) -> bool:
        return self._first is None or index == self._first


WAYS_OUT = "Use cache.reset(), or a new SawCache"
