"""The pages of one layer of a SawCache.

Over 400 lines: Transformers' interface of layers has many methods, and each has to be right for padding, windows,
beams, crops, compiled steps and offloading.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import CacheLayerMixin

from sawkv import ops
from sawkv.cache import PagedKVCache
from sawkv.errors import LayoutError, UnsupportedError
from sawkv.format.constants import BUCKET_SIZE
from sawkv.format.layout import PageLayout
from sawkv.format.spec import CacheFormat
from sawkv.integrations.transformers.models import NAME
from sawkv.integrations.transformers.pages import Paging
from sawkv.integrations.transformers.passes import Passes
from sawkv.integrations.transformers.prepare import Preparation, warn_once
from sawkv.integrations.transformers.states import check_states
from sawkv.kernels import NO_FAST_KERNELS, select_backend
from sawkv.prepare.calibration import Calibration, LayerCalibration, model_id
from sawkv.prepare.turning import buckets_in

PAGE_SIZE = 16

UNCOMPILED = (
    f'only decoding steps of a SawCache with max_cache_len, after its first pass, with attention "{NAME}", are compiled'
)
"""Why PyTorch's compiler does not see into a layer."""

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Settings:
    """Settings that the layers of a cache share. Arguments as in `SawCache`; `sources` as `kv_sources` gives them."""

    config: PretrainedConfig
    format: CacheFormat
    max_len: int | None
    exact_prefill: bool
    backend: str | None
    calibration: Calibration | Preparation | None
    offload: bool
    sources: list[int]
    record_past: bool = False
    pagings: dict[tuple[torch.device, PageLayout, int], Paging] = field(default_factory=dict)
    passes: Passes = field(default_factory=Passes)

    @property
    def read_by_sawkv(self) -> bool:
        """Whether the model's attention implementation is ours."""
        return bool(self.config._attn_implementation == NAME)


class SawLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Pages of one layer. Layers with equal pages and windows share a `Paging`, which the first of them advances."""

    is_croppable = True

    def __init__(self, settings: Settings, index: int, window: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._settings = settings
        self.index, self.window = index, window
        self.is_sliding = window > 0
        self.paging: Paging
        self.pages: PagedKVCache | None = None
        self._held = 0, 0  # first_page and num_pages of self.pages
        self._home: torch.Tensor | None = None  # bytes of offloaded pages between passes, and which they are
        self._home_held = 0, 0
        self._calibration, self._is_calibrated = LayerCalibration(), False
        self._dtypes = torch.float32, torch.float32  # of K and V, as they came last

    @property
    def model_type(self) -> str:
        """The model's type, for messages."""
        return str(self._settings.config.model_type)

    def __repr__(self) -> str:
        return f"SawLayer({self._settings.format}, window={self.window})"

    @property
    def last_reader(self) -> int:
        """Index of the last layer that reads these pages: this one, or one that shares them."""
        sources = self._settings.sources
        return len(sources) - 1 - sources[::-1].index(self.index)

    def reader(self, module: torch.nn.Module) -> int:
        """Index of the layer that a model's attention module belongs to, which reads these pages.

        Raises:
            UnsupportedError: it is not one that the config says shares them.
        """
        sources = self._settings.sources
        if self.last_reader == self.index:
            return self.index
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or not 0 <= index < len(sources) or sources[index] != self.index:
            raise UnsupportedError(
                f"SawCache: expected layers of a {self.model_type} to share K and V with the last layer of their type,"
                f" got layer {index!r} with the K and V of layer {self.index}"
            )
        return index

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]  # a class attribute there
        """Whether decoding steps can be compiled: pages never move, and our attention reads them."""
        return self._settings.max_len is not None and self._settings.read_by_sawkv

    @property
    def is_first(self) -> bool:
        """Whether this layer advances the shared `paging`."""
        return self.paging.first_layer == self.index

    @property
    def exact(self) -> bool:
        """Whether attention in this pass takes new K and V unquantized."""
        return self._settings.exact_prefill and self.paging.is_fresh

    @property
    def nbytes(self) -> int:
        """Bytes of this layer's pages."""
        pages = self._home if self.pages is None else self.pages.pages
        return 0 if pages is None else pages.nbytes

    @property
    def batch_size(self) -> int:
        return self.paging.batch_size if self.is_initialized else -1

    @property
    def keys(self) -> torch.Tensor | None:
        """K as attention sees it, decoded at each access: [batch_size, num_kv_heads, tokens, head_dim], with zeros for
        padding.

        With a window, K of the tokens that the next one sees. None before the first pass. The pages take `nbytes`,
        whatever the size of this tensor.
        """
        return self.states()[0]

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        """The base class says here that it holds none."""

    @property
    def values(self) -> torch.Tensor | None:
        """V, as `keys`."""
        return self.states()[1]

    @values.setter
    def values(self, value: torch.Tensor | None) -> None: ...

    @torch.compiler.disable(reason=UNCOMPILED)  # type: ignore[untyped-decorator, no-untyped-call]
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take heads, head_dim, batch and device from the first K and V: [batch_size, num_kv_heads,
        num_new, head_dim].
        """
        check_states(key_states, value_states)
        batch_size, num_kv_heads, _, head_dim = key_states.shape
        settings, device = self._settings, key_states.device
        layout = PageLayout(settings.format, num_kv_heads, head_dim, PAGE_SIZE)
        key = device, layout, self.window
        if key not in settings.pagings:
            if select_backend(device, layout, settings.backend).name == "reference" and settings.backend is None:
                logger.warning(NO_FAST_KERNELS)
            paging = Paging(
                layout, device, self.window, batch_size, settings.max_len, settings.backend, first_layer=self.index
            )
            paging.record_past(settings.record_past)
            settings.pagings[key] = paging
        self.paging = settings.pagings[key]
        self.hold(self.paging.first_page, self.paging.num_pages)
        if settings.offload:
            self._store(0)
        self.is_initialized = True

    @torch.compiler.disable(reason=UNCOMPILED)  # type: ignore[untyped-decorator, no-untyped-call]
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new K and V, and decode all tokens, for attention that reads tensors. Shapes as in
        `SawCache.update`.
        """
        warn_once(
            f"sawkv: the model's attention implementation, {self._settings.config._attn_implementation}, cannot read"
            ' pages: every step decodes the whole cache first. For speed, call model.set_attn_implementation("sawkv")'
        )
        with self.paging.on_device():
            self.enter(key_states, value_states)
            self.write(key_states, value_states)
            exact = key_states, value_states
            states = exact if self.exact else self.decode(key_states.dtype, value_states.dtype)
            self.settle()
        return states

    def enter(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        num_q_heads: int | None = None,
        mask: torch.Tensor | None = None,
    ) -> None:
        """Begin this layer's part of a forward pass. Arguments are checked first, so a refusal changes nothing.

        Args:
            key_states, value_states: as in `SawCache.update`.
            num_q_heads, mask: as in `Paging.begin`.

        Raises:
            LayoutError: batch, heads, head_dim or device differ from those of this layer; or as in `Passes.enter` and
                `Paging.begin`.
            UnsupportedError: as in `check_states`.
        """
        num_new, passes = key_states.shape[2], self._settings.passes
        passes.enter(self.index, num_new)
        self._check(key_states, value_states)
        if not self._is_calibrated:
            self._calibrate()
        with passes.changing("the begin of a forward pass"):
            if self.is_first:
                self.paging.begin(num_new, num_q_heads, mask)
            passes.begin(self.index, num_new)
        self._check_centers(self.paging.length)
        self._dtypes = key_states.dtype, value_states.dtype

    @torch.inference_mode(False)
    def _calibrate(self) -> None:
        """Take the calibration of this layer, before its first token."""
        source, layout = self._settings.calibration, self.paging.layout
        if isinstance(source, Calibration):
            source.check(
                cache_format=layout.format,
                model=model_id(self._settings.config),
                num_layers=self._settings.config.num_hidden_layers,
                num_kv_heads=layout.num_kv_heads,
                head_dim=layout.head_dim,
            )
        if source is not None:
            self._calibration = source.layer(self.index).to(self.paging.device)
        if self.pages is not None:
            self.pages = PagedKVCache(self.pages.pages, layout, **self._calibration.constants())
        self._is_calibrated = True
        self._check_centers(self._settings.max_len or 0)  # compiled steps do not know their length

    def _check_centers(self, length: int) -> None:
        """Warn if a sequence of `length` tokens has later positions than K has centers."""
        center = self._calibration.k_center
        if center is not None and 1 < len(center) < buckets_in(length):
            warn_once(
                f"sawkv: K has centers for {len(center) * BUCKET_SIZE} positions, and a sequence has more. Later tokens"
                " take the last center, and lose accuracy. `sawkv prepare --context` makes centers for more."
            )

    def enter_compiled(
        self, key_states: torch.Tensor, value_states: torch.Tensor, num_q_heads: int, mask: torch.Tensor | None
    ) -> None:
        """`enter` for one new token, without the host."""
        passes = self._settings.passes
        passes.enter(self.index, 1)
        self._check(key_states, value_states)
        with passes.changing("the begin of a forward pass"):
            if self.is_first:
                self.paging.begin_compiled(num_q_heads, mask)
            passes.begin(self.index, 1)

    def _check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        check_states(key_states, value_states)
        paging = self.paging
        got, held = (key_states.shape[0], key_states.device), (paging.batch_size, paging.device)
        if got != held:
            raise LayoutError(
                f"SawCache: expected {held[0]} sequences on {held[1]}, as before, got {got[0]} on {got[1]}"
            )
        shape, layout = key_states.shape, paging.layout
        if (shape[1], shape[3]) != (layout.num_kv_heads, layout.head_dim):
            raise LayoutError(
                f"SawCache: expected {layout.num_kv_heads} KV heads of {layout.head_dim} channels in layer"
                f" {self.index}, as before, got {shape[1]} of {shape[3]}"
            )

    def write(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Quantize new tokens and write them to their slots, after `enter`."""
        paging = self.paging
        self._fetch()
        self.hold(paging.first_page, paging.num_pages)
        assert self.pages is not None
        dtype = torch.promote_types(key_states.dtype, value_states.dtype)  # under autocast K is wider than V
        k, v = (_rows(states.detach().to(dtype)) for states in (key_states, value_states))
        ops.append(k, v, self.pages, paging.slots, paging.positions, backend=paging.backend)

    def attend(self, query: torch.Tensor, scale: float, softcap: float, sinks: torch.Tensor | None) -> torch.Tensor:
        """Attention of new tokens over the pages, after `write`.

        Args:
            query: [batch_size, num_q_heads, num_new, head_dim].
            scale, softcap, sinks: as in `ops.Attention`.

        Returns:
            [batch_size, num_new, num_q_heads, head_dim].
        """
        paging = self.paging
        batch_size, num_q_heads, num_new, head_dim = query.shape
        assert self.pages is not None
        assert paging.step is not None
        attention = ops.attention(
            self.pages,
            num_q_heads=num_q_heads,
            softmax_scale=scale,
            sliding_window=self.window,
            logit_softcap=softcap,
            sinks=sinks,
            backend=paging.backend,
        )
        attended = attention(_rows(query.detach()), paging.step)
        return attended.view(batch_size, num_new, num_q_heads, head_dim)

    def decode(self, k_dtype: torch.dtype, v_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V for this pass's attention, after `write`: the last `paging.num_keys` tokens, in
        the shape of `keys`.
        """
        return self._gather(self.paging.num_keys, k_dtype, v_dtype)

    @torch.no_grad()
    def states(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """`keys` and `values`."""
        if not self.is_initialized:
            return None, None
        self._settings.passes.check_whole()
        is_away = self.pages is None
        with self.paging.on_device():
            self._fetch()
            states = self._gather(self.paging.past_keys, *self._dtypes)
        if is_away:
            self.pages = None
        return states

    def _gather(self, num_keys: int, k_dtype: torch.dtype, v_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        paging, layout = self.paging, self.paging.layout
        table, seq_lens, first_positions = paging.tail_table(num_keys, self._held)
        # Each sequence ends at the end of its rows; those before are of the page in which its first key lies, and are
        # cut off.
        rows = num_keys + (layout.page_size if self.window else 0)
        ends = torch.arange(paging.batch_size + 1, dtype=torch.int32, device=paging.device) * rows
        starts = torch.cat([ends[1:] - seq_lens, ends[-1:]])
        shape = paging.batch_size * rows, layout.num_kv_heads, layout.head_dim
        states = torch.zeros((2, *shape), dtype=torch.promote_types(k_dtype, v_dtype), device=paging.device)
        assert self.pages is not None
        ops.gather(
            self.pages,
            table,
            seq_lens,
            starts,
            states[0],
            states[1],
            rotated=False,
            first_positions=first_positions,
            backend=paging.backend,
        )
        k, v = states.view(2, paging.batch_size, rows, *shape[1:])[:, :, rows - num_keys :].transpose(2, 3)
        return k.to(k_dtype), v.to(v_dtype)

    @torch.inference_mode(False)
    def hold(self, first_page: int, num_pages: int) -> None:
        """Make room for these pages of each sequence, and copy the pages that are kept."""
        if self.pages is not None and self._held == (first_page, num_pages):
            return
        paging = self.paging
        pages = PagedKVCache.allocate(
            paging.layout, num_pages * paging.batch_size, paging.device, **self._calibration.constants()
        )
        if self.pages is not None:
            size, first = paging.batch_size, max(first_page, self._held[0])
            end = max(first, min(first_page + num_pages, sum(self._held)))
            pages.pages[(first - first_page) * size : (end - first_page) * size] = self.pages.pages[
                (first - self._held[0]) * size : (end - self._held[0]) * size
            ]
        self.pages, self._held = pages, (first_page, num_pages)

    def settle(self) -> None:
        """End a pass: keep the pages that later passes need, on the device or the host."""
        self.hold(*self.paging.kept)
        if self._settings.offload:
            self._store(max(0, self.paging.first_written - self._held[0]) * self.paging.batch_size)
        self._settings.passes.finish(self.index)

    def _fetch(self) -> None:
        """Copy offloaded pages to the device. It runs in the order of the stream, so nothing waits."""
        if self.pages is None and self._home is not None:
            pages = torch.empty_like(self._home, device=self.paging.device).copy_(self._home, non_blocking=True)
            self.pages = PagedKVCache(pages, self.paging.layout, **self._calibration.constants())

    @torch.inference_mode(False)
    def _store(self, first_row: int) -> None:
        """Copy pages to the host, from row `first_row` of the tensor on, and free them on the device."""
        assert self.pages is not None
        pages = self.pages.pages
        if self._home is None or self._home.shape != pages.shape or self._home_held != self._held:
            self._home, first_row = torch.empty_like(pages, device="cpu", pin_memory=pages.is_cuda), 0
        self._home[first_row:].copy_(pages[first_row:], non_blocking=True)
        self.pages, self._home_held = None, self._held

    def offload(self) -> None:
        """Transformers' own caches move a layer to the host by this.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "SawCache: expected no call of offload or prefetch: SawCache(model, offload=True) moves its pages by itself"
        )

    prefetch = offload

    def get_seq_length(self) -> Any:
        """Tokens held, padding included: an int, or a tensor if pages never move, as compiled steps need it."""
        if not self.is_initialized:
            return 0
        return self.paging.length if self._settings.max_len is None else self.paging.length_tensor()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that a mask covers, and the index of the first."""
        if self.is_compileable and query_length == 1:
            return self.get_max_length(), 0  # of one shape in all steps
        return self.paging.mask_sizes(query_length) if self.is_initialized else (query_length, 0)

    def get_max_length(self) -> int:
        return -1 if self._settings.max_len is None else self._settings.max_len

    get_max_cache_shape = get_max_length  # Transformers before 5.13

    def reset(self) -> None:
        """Forget all tokens. See `SawCache.reset`."""
        if self._settings.max_len is None or self._settings.passes.broken:
            self.is_initialized, self.pages, self._home, self._held = False, None, None, (0, 0)
            self._settings.pagings.clear()
        elif self.is_initialized and self.is_first:
            self.paging.reset()

    @property
    def record_past(self) -> bool:
        """Whether a sliding window keeps tokens that a crop may need, until the next crop. Applies to all layers."""
        return self._settings.record_past

    @record_past.setter
    def record_past(self, wanted: bool) -> None:
        self._settings.record_past = wanted
        for paging in self._settings.pagings.values():
            paging.record_past(wanted)

    def activate_past_recording(self) -> None:
        """Transformers calls this before it drafts tokens."""
        self.record_past = True

    @torch.inference_mode(False)  # pages outlive the mode that a caller is in
    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder or subset the batch to `beam_idx`."""
        if not self.is_initialized:
            return
        self._fetch()
        paging, pages = self.paging, self.pages
        assert pages is not None
        index = beam_idx.to(paging.device)
        old = pages.pages.view(self._held[1], -1, *pages.pages.shape[1:])
        taken = old.index_select(1, index)
        if self._settings.max_len is not None and taken.shape == old.shape:
            old.copy_(taken)
        else:
            self.pages = PagedKVCache(taken.flatten(0, 1), pages.layout, **self._calibration.constants())
        if self._settings.offload:
            self._store(0)
        if self.is_first:
            paging.take(index)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[batch_size, heads, tokens, head_dim] as [batch_size * tokens, heads, head_dim]."""
    rows = x.transpose(1, 2).flatten(0, 1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()
