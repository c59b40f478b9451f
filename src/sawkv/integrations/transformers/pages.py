"""Lengths, page table, slots and schedule of a batch, computed once per forward pass for layers of equal shape."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from sawkv import ops
from sawkv.errors import LayoutError
from sawkv.format.layout import PageLayout
from sawkv.kernels import Step

MAX_PAGED_QUERIES = 8
"""Most query tokens per sequence for which attention reads pages. Longer passes are prompts, and
use 16-bit attention.
"""

MIN_SPARE_PAGES = 8
SPARE_SHARE = 32
"""A full layer grows by 1/32 of its pages. So spare room costs 3 % of memory, and copies are rare."""

CROP_MARGIN = 64
"""Tokens that a sliding window keeps beyond itself, so that some drafted tokens can always be removed (`crop`)."""


class Paging:
    """State that layers with one device, page layout and window share.

    All sequences of a batch have the same length as Transformers counts it, left padding included. Padding is not
    stored: the token at index t of sequence b has position t - pads[b]. Page j of sequence b is page (j - first_page) *
    batch_size + b of a layer's tensor.

    Attributes:
        layout, device: of the pages.
        window: tokens that a query sees, itself included; 0 is no limit. Pages before it are dropped.
        batch_size: number of sequences.
        first_layer: index of the layer that calls `begin`.
        max_len: tokens per sequence for layers whose pages never move; None for layers that grow.
        lengths: [batch_size] int32, positions used so far: the length without padding.
        pads: [batch_size] int32, left padding.
        first_page, num_pages: range of each sequence's pages that layers hold in this pass.
        kept: the same range after the pass. A long prompt gives a sliding window more pages than it needs later.
        first_written: first page that this pass writes to, if pages grow.
        block_table: [batch_size, first_page + num_pages] int32.
        slots: [batch_size * num_new] int64, where this pass writes; -1 for padding.
        positions: [batch_size * num_new] int64, of the tokens of this pass; negative for padding.
        step: the step for this pass's attention, if it reads pages.
        reads_pages: whether this pass's attention reads pages. Otherwise K and V are decoded for the model's own
            attention.
        is_fresh: whether this pass has the first tokens.
        num_keys: rows of K and V per sequence for the model's own attention in this pass, new ones included.
    """

    @torch.inference_mode(False)  # what is made here outlives a pass, and the mode of that pass
    def __init__(
        self,
        layout: PageLayout,
        device: torch.device,
        window: int,
        batch_size: int,
        max_len: int | None,
        backend: str | None,
        first_layer: int,
    ) -> None:
        self.first_layer = first_layer
        self.layout, self.device, self.window, self.max_len, self.backend = layout, device, window, max_len, backend
        self.reads_pages = self.is_fresh = False
        self.num_keys = self.first_written = 0
        self._set_batch(torch.zeros(batch_size, dtype=torch.int32, device=device))
        self.lengths = torch.zeros_like(self.pads)
        self._length = 0
        self._max_pad = 0
        self._keep_from: int | None = None
        self.kept = 0, 0
        self._hold(0, 0 if max_len is None else -(-max_len // layout.page_size))

    def _set_batch(self, pads: torch.Tensor) -> None:
        """Make the tensors whose size is the number of sequences."""
        self.pads, self.batch_size = pads, pads.shape[0]
        self._sequence = torch.arange(self.batch_size, device=self.device)
        # CUDA graphs need a fixed address.
        self._one_token = torch.zeros(2, self.batch_size, dtype=torch.int64, device=self.device)
        self.slots, self.positions = self._one_token
        self._starts: dict[int, torch.Tensor] = {}
        self._schedules: dict[tuple[int, int], ops.Schedule] = {}
        self.step: Step | None = None
        self._start_of(1)

    @property
    def length(self) -> int:
        """Tokens per sequence, left padding included. If pages never move, this waits for the device, because a CUDA
        graph may have advanced it.
        """
        if self.max_len is None:
            return self._length
        return int(self.length_tensor())

    def on_device(self) -> AbstractContextManager[object]:
        """Makes this device the current one, because kernels run on the current GPU."""
        several = self.device.type == "cuda" and torch.cuda.device_count() > 1
        return torch.cuda.device(self.device) if several else nullcontext()

    def length_tensor(self) -> torch.Tensor:
        """`length` as a tensor without dimensions, int64."""
        return (self.lengths[0] + self.pads[0]).long()

    @property
    def past_keys(self) -> int:
        """Past tokens that the next token of each sequence sees."""
        return self._past_keys(self.length)

    def mask_sizes(self, num_new: int) -> tuple[int, int]:
        """Number of keys that a mask for `num_new` queries covers, and the index of the first."""
        length = self.length
        past = self._past_keys(length)
        return past + num_new, length - past

    def begin(self, num_new: int, num_q_heads: int | None = None, mask: torch.Tensor | None = None) -> None:
        """Make room for `num_new` tokens per sequence, and compute what layers need to write and read them.

        Args:
            num_new: tokens per sequence in this pass.
            num_q_heads: of the attention that will read pages; None if none will.
            mask: [batch_size or 1, 1, num_new, num_keys] bool, True where a query sees a key; or another dtype, added
                to scores. None is causal. In the first pass, leading tokens that do not see themselves are padding.

        Raises:
            LayoutError: there is no room, or the mask shows padding. Nothing has changed.
        """
        length = self.length
        if self.max_len is not None and length + num_new > self.max_len:
            raise LayoutError(
                f"SawCache: expected at most max_cache_len={self.max_len} tokens, got {length} and {num_new} more"
            )
        is_fresh = length == 0
        if is_fresh:
            self._find_padding(num_new, mask)
        reads_pages = num_q_heads is not None and 0 < num_new <= MAX_PAGED_QUERIES
        if reads_pages and mask is not None:
            reads_pages = (
                mask.dtype == torch.bool and mask.shape[1] == 1 and bool(self.agrees(mask, num_new, ahead=num_new))
            )
        if mask is not None and not reads_pages and not is_fresh and self._max_pad:
            self._check_padding(mask, num_new)
        if num_q_heads is not None and self.max_len is not None:
            self._schedule(num_q_heads, 1)  # made here, since a compiled step must not allocate what it keeps
        schedule = self._schedule(num_q_heads, num_new) if reads_pages and num_q_heads is not None else None
        if self.max_len is None:
            self._make_room(length, length + num_new)
        self.is_fresh, self.reads_pages = is_fresh, reads_pages
        self.num_keys = self._past_keys(length) + num_new
        self.first_written = max(0, length - self._max_pad) // self.layout.page_size
        self.advance(num_new)
        self._length = length + num_new
        self.step = (
            None if schedule is None else schedule.update(self.block_table, self.lengths, self._start_of(num_new))
        )

    def begin_compiled(self, num_q_heads: int, mask: torch.Tensor | None) -> None:
        """`begin` for one new token, without the host. `max_len` is set, and an uncompiled pass came first.

        A mask that is not causal, or a full sequence, stops the device with an error, because the graph cannot raise
        one.
        """
        assert self.max_len is not None
        self.advance(1)
        torch._assert_async((self.lengths + self.pads <= self.max_len).all())
        if mask is not None:
            torch._assert_async(self.agrees(mask, 1))
        self.step = self._schedule(num_q_heads, 1).update(self.block_table, self.lengths, self._start_of(1))

    def cut_mask(self, mask: torch.Tensor | None, num_new: int) -> torch.Tensor | None:
        """A mask for the `num_keys` keys that `SawLayer.decode` returns; None if PyTorch's causal attention computes
        the same.
        """
        if mask is not None and self.max_len is not None and num_new == 1:  # it covers every index up to max_len
            return mask[..., self.length - self.num_keys : self.length]
        if mask is None and 1 < num_new < self.num_keys:
            return self.visible(num_new, self.num_keys)[:, None]
        return mask

    def advance(self, num_new: int) -> None:
        """Count `num_new` tokens, and compute their positions and slots, without the host."""
        size = self.layout.page_size
        position = self.lengths[:, None].long() + torch.arange(num_new, device=self.device)
        page = (position // size - self.first_page) * self.batch_size + self._sequence[:, None]
        slots = torch.where(position >= 0, page * size + position % size, -1).flatten()
        placed = torch.stack([slots, position.flatten()])
        self.slots, self.positions = self._one_token.copy_(placed) if num_new == 1 else placed
        self.lengths.add_(num_new)

    def agrees(self, mask: torch.Tensor, num_new: int, ahead: int = 0) -> torch.Tensor:
        """Whether a bool mask shows queries exactly the keys that reading pages shows them: a bool tensor without
        dimensions. `ahead`: tokens to advance first.
        """
        return (mask[:, 0] == self.visible(num_new, mask.shape[-1], ahead)).all()

    def visible(self, num_new: int, num_keys: int, ahead: int = 0) -> torch.Tensor:
        """The causal mask with padding and window, `ahead` tokens from now: [batch_size, num_new, num_keys] bool."""
        lengths = (self.lengths + ahead)[:, None]
        query = (lengths + torch.arange(-num_new, 0, device=self.device))[:, :, None]
        if num_keys == self.max_len and num_new == 1:
            key = torch.arange(num_keys, device=self.device) - self.pads[:, None]
        else:
            key = lengths + torch.arange(-num_keys, 0, device=self.device)
        key = key[:, None, :]
        seen = (key >= 0) & (key <= query)
        return seen & (query - key < self.window) if self.window else seen

    def _schedule(self, num_q_heads: int, num_new: int) -> ops.Schedule:
        """The schedule for passes of `num_new` tokens per sequence."""
        key = num_q_heads, num_new
        if key not in self._schedules:
            self._schedules[key] = ops.Schedule(
                self.layout,
                self.device,
                num_q_heads=num_q_heads,
                max_num_seqs=self.batch_size,
                max_query_len=num_new,
                sliding_window=self.window,
                backend=self.backend,
            )
        return self._schedules[key]

    def tail_table(self, num_tokens: int, held: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pages of the last `num_tokens` tokens of each sequence.

        Args:
            num_tokens: per sequence, padding included.
            held: first page and number of pages per sequence in the layer that is read.

        Returns:
            block_table: [batch_size, pages] int32, from the page of the first token on.
            seq_lens: [batch_size] int32, tokens from the start of that page; at most num_tokens + page_size - 1.
            first_positions: [batch_size] int32, of the first token of that page.
        """
        size = self.layout.page_size
        first = (self.lengths - num_tokens).clamp(min=0) // size
        pages = first[:, None] - held[0] + torch.arange(num_tokens // size + 2, device=self.device)
        table = pages.clamp(0, held[1] - 1) * self.batch_size + self._sequence[:, None]
        return table.int(), (self.lengths - first * size).int(), (first * size).int()

    @torch.inference_mode(False)
    def take(self, index: torch.Tensor) -> None:
        """Reorder or subset the batch to `index`."""
        lengths = self.lengths[index]
        if self.max_len is not None and index.shape[0] == self.batch_size:
            self.lengths.copy_(lengths)
            self.pads.copy_(self.pads[index])
            return
        self.lengths = lengths
        self._set_batch(self.pads[index])
        self._hold(*self.kept)

    def check_crop(self, length: int) -> None:
        """Check whether the cache can be cropped to `length`.

        Raises:
            LayoutError: a sliding window no longer has tokens that sequences of this length would see.
        """
        if self._first_needed(length) < self.kept[0]:
            raise LayoutError(
                f"SawCache: expected `activate_past_recording()` before taking back {self.length - length} tokens of a"
                " sliding window"
            )

    def crop(self, length: int) -> None:
        """Shorten every sequence to `length` tokens. Padding beyond that is no longer counted as padding."""
        self.pads.clamp_(max=length)
        self.lengths.copy_(length - self.pads)
        self._length, self._max_pad = length, min(self._max_pad, length)
        if self._keep_from is not None:
            self._keep_from = length

    def reset(self) -> None:
        """Forget all tokens."""
        for counter in (self.lengths, self.pads):
            counter.zero_()
        self._length = self._max_pad = 0

    def record_past(self, wanted: bool) -> None:
        """Keep tokens that a crop may need, until the next crop."""
        if wanted != (self._keep_from is not None):
            self._keep_from = self.length if wanted else None

    def __getstate__(self) -> dict[str, object]:
        """Leave out schedules, which serve one cache at a time."""
        return vars(self) | {"_schedules": {}, "step": None}

    def _past_keys(self, length: int) -> int:
        return min(length, self.window - 1) if self.window else length

    def _start_of(self, num_new: int) -> torch.Tensor:
        if num_new not in self._starts:
            self._starts[num_new] = torch.arange(self.batch_size + 1, dtype=torch.int32, device=self.device) * num_new
        return self._starts[num_new]

    def _find_padding(self, num_new: int, mask: torch.Tensor | None) -> None:
        self._max_pad = 0
        self.pads.zero_()
        if mask is not None and mask.dtype == torch.bool:
            seen = mask[..., :num_new].flatten(1, 2).any(1)
            self.pads.copy_((~seen).int().cumprod(-1).sum(-1))  # a mask of one row serves the whole batch
            self._max_pad = int(self.pads.max())
        torch.neg(self.pads, out=self.lengths)

    def _check_padding(self, mask: torch.Tensor, num_new: int) -> None:
        """Check that the mask still hides padding.

        Raises:
            LayoutError: the mask shows a token that was padding in its own pass, and was not stored.
        """
        first = 0 if self.max_len is not None and num_new == 1 else self.length - self._past_keys(self.length)
        shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        padding = torch.arange(first, first + mask.shape[-1], device=self.device) < self.pads[:, None]
        if bool((shown & padding[:, None, None]).any()):
            raise LayoutError(
                "SawCache: expected a mask that hides left padding as in the first pass, got one that shows it: it was"
                " not stored"
            )

    def _first_needed(self, length: int) -> int:
        """First page that a sequence of this length sees."""
        if not self.window:
            return 0
        if self._keep_from is not None:
            length = min(length, self._keep_from)
        return max(0, length - self._max_pad - self.window + 1) // self.layout.page_size

    def _make_room(self, past: int, length: int) -> None:
        """Hold the pages from the window of the token at `past` to the end of `length`, and choose those to keep."""
        needed = self._needed(past, length)
        if (self.first_page, self.num_pages) != self.kept:
            self._hold(*self.kept)
        if needed[0] + needed[1] > self.first_page + self.num_pages or self.num_pages > needed[1] + 2 * _spare(
            needed[1]
        ):
            self._hold(needed[0], needed[1] + _spare(needed[1]))
        self.kept = self.first_page, self.num_pages
        first, count = self._needed(length, length)
        if self.num_pages > count + 2 * _spare(count):
            self.kept = first, count + _spare(count)

    def _needed(self, past: int, length: int) -> tuple[int, int]:
        """First page and number of pages, for queries from `past` on."""
        first = self._first_needed(max(0, past - CROP_MARGIN))
        return first, -(-length // self.layout.page_size) - first

    def _hold(self, first_page: int, num_pages: int) -> None:
        self.first_page, self.num_pages = self.kept = first_page, num_pages
        page = torch.arange(first_page + num_pages, device=self.device) - first_page
        self.block_table = (page.clamp(min=0)[None] * self.batch_size + self._sequence[:, None]).int()


def _spare(num_pages: int) -> int:
    return max(MIN_SPARE_PAGES, num_pages // SPARE_SHARE)
