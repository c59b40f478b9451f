"""Tracks the layers that a forward pass has reached. A pass that ends between layers leaves its tokens in some of them,
and later uses have to notice it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sawkv.errors import LayoutError, SawkvError


@dataclass(eq=False)
class Passes:
    """The forward passes over one cache.

    Each pass begins at the layer at which the first pass began, and brings the same number of tokens to each layer
    once.

    Attributes:
        number: passes begun.
        num_new: tokens per sequence in the last pass.
        done: the last finished pass of each layer, by layer index.
        written: recurrent states that were written since a layer of attention last began.
        broken: the change that was interrupted and cannot be undone; empty if there is none.
    """

    number: int = 0
    num_new: int = 0
    done: dict[int, int] = field(default_factory=dict)
    written: set[tuple[Any, ...]] = field(default_factory=set)
    broken: str = ""
    _first: int | None = None

    def enter(self, index: int, num_new: int) -> None:
        """Check whether a layer may take part in the current pass, or begin a new one. Changes nothing.

        Raises:
            LayoutError: layers hold different tokens, or would.
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
        """Record that layer `index` has entered the pass, and has room for its tokens."""
        if self._begins(index):
            self._first, self.num_new = index, num_new
            self.number += 1
        self.written.clear()
        self.done.setdefault(index, self.number - 1)

    def write_state(self, *state: Any) -> None:
        """Record that a layer is about to write a recurrent state. `state` names it.

        Raises:
            LayoutError: it was written before, with no layer of attention since: that pass ended in between.
        """
        if state in self.written:
            self.broken = "a forward pass, before its first layer of attention,"
        self.check_usable()
        self.written.add(state)

    def finish(self, index: int) -> None:
        """Record that layer `index` has written its tokens, and attended."""
        self.done[index] = self.number

    @contextmanager
    def changing(self, what: str) -> Iterator[None]:
        """Encloses a change of all layers. Refusals are raised before it; any interruption within it leaves the cache
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
        """Whether some layer lacks the last pass."""
        return any(number != self.number for number in self.done.values())

    def check_usable(self) -> None:
        """Refuse a cache in which an earlier call was interrupted.

        Raises:
            LayoutError: the cache is broken.
        """
        if self.broken:
            raise LayoutError(f"SawCache: {self.broken} stopped half way, so its layers are unlike. {WAYS_OUT}")

    def check_whole(self, taken_back: int = 0) -> None:
        """Check that all layers hold the same tokens once the last `taken_back` are removed.

        Raises:
            LayoutError: some layer lacks the last pass.
        """
        self.check_usable()
        if self.unfinished and taken_back < self.num_new:
            reached = sum(number == self.number for number in self.done.values())
            raise LayoutError(
                f"SawCache: the last forward pass ended in {reached} of {len(self.done)} layers. Take back its"
                f" {self.num_new} tokens by cache.crop({-self.num_new}), or all by cache.reset()"
            )

    def take_back(self, is_empty: bool) -> None:
        """Record that the last pass was removed from all layers; with `is_empty`, all passes."""
        if is_empty:
            self.number, self.done, self._first = 0, {}, None
        self.done = dict.fromkeys(self.done, self.number)

    def _begins(self, index: int) -> bool:
        return self._first is None or index == self._first


WAYS_OUT = "Use cache.reset(), or a new SawCache"
