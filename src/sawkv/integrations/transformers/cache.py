"""`SawCache`: a Transformers cache over sawkv's pages.

Over 400 lines: Transformers' cache interface has many methods, and each has to be right for padding, windows, beams,
crops, compiled steps and offloading.
"""

from __future__ import annotations

import copy
import itertools
import logging
import operator
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from sawkv import ops
from sawkv.cache import PagedKVCache
from sawkv.errors import CalibrationError, LayoutError, UnsupportedError
from sawkv.format.layout import PageLayout
from sawkv.format.spec import CacheFormat
from sawkv.integrations.transformers.models import NAME, find_model, head_dim_of, layer_configs, layer_windows
from sawkv.integrations.transformers.pages import Paging
from sawkv.integrations.transformers.passes import Passes
from sawkv.integrations.transformers.prepare import Preparation, warn_once
from sawkv.kernels import select_backend
from sawkv.prepare.calibration import Calibration, LayerCalibration, model_id

PAGE_SIZE = 16

UNPREPARED = (
    "sawkv: INT4 pages of a model that is not prepared (prepare=False). Keys with a large static part, as in Qwen2.5,"
    " then lose most of their 4 bits: such a model's perplexity can rise manyfold"
)

logger = logging.getLogger(__name__)

CACHES: weakref.WeakValueDictionary[int, SawCache] = weakref.WeakValueDictionary()
"""Caches by `SawCache.handle`. A compiled graph can hold a number, and not a cache."""

_handles = itertools.count(2)  # compilers make constants of 0 and 1


@dataclass(eq=False)
class _Settings:
    """Settings that the layers of a cache share. Arguments as in `SawCache`."""

    config: PretrainedConfig
    format: CacheFormat
    max_len: int | None
    exact_prefill: bool
    backend: str | None
    calibration: Calibration | Preparation | None
    offload: bool
    record_past: bool = False
    pagings: dict[tuple[torch.device, PageLayout, int], Paging] = field(default_factory=dict)
    passes: Passes = field(default_factory=Passes)

    @property
    def read_by_sawkv(self) -> bool:
        """Whether the model's attention implementation is ours."""
        return bool(self.config._attn_implementation == NAME)


class SawCache(Cache):
    """A KV cache for `model.generate(..., past_key_values=SawCache(model))` that keeps K and V as rotated INT4 pages.

    The first forward pass with the first cache of a model prepares the model: it runs text that ships with sawkv, and
    fits centers, gains and feedback (`sawkv.integrations.transformers.prepare`). This takes seconds, once. The model is
    left unchanged.

    With the attention implementation `sawkv`, passes of up to 8 new tokens per sequence read the pages, and 16-bit K
    and V never exist. Longer passes are decoded, one layer at a time, for PyTorch's attention. With any other
    implementation every step decodes the whole layer first, which gives the same result more slowly. Both attend to the
    quantized K and V, those of new tokens included.

    Args:
        config: the model, or its config (`model.config` itself, by which the model is found).
        format: a `CacheFormat` or its name, such as `int4-k128-v128`; `int4` takes the default rotation for the model's
            head_dim.
        max_cache_len: tokens to allocate at once, so that `generate` compiles the decoding step (to CUDA graphs, by
            default). None grows as needed, and is not compiled.
        exact_prefill: attend to exact K and V in the first pass of a prompt. Its output then depends on how the prompt
            is cut into passes.
        calibration: a calibration of this model, or the file that `sawkv prepare` wrote. None prepares the model.
        prepare: False leaves the model unprepared, which may cost much accuracy. It matters for int4 alone.
        offload: keep pages in host memory, and copy those of one layer at a time to the device.
        backend: a name from `sawkv doctor`; None chooses the fastest.

    Raises:
        CalibrationError: the calibration cannot be read; or, at the first pass, is of another model or format.
        UnsupportedError: a layer has something other than causal self-attention, with or without a sliding window; or,
            at the first pass, the model cannot be prepared.
        FormatError: the format is not valid, or does not fit the model's head_dim.
    """

    def __init__(
        self,
        config: torch.nn.Module | PretrainedConfig,
        format: str | CacheFormat = "int4",
        *,
        max_cache_len: int | None = None,
        exact_prefill: bool = False,
        calibration: Calibration | str | Path | None = None,
        prepare: bool = True,
        offload: bool = False,
        backend: str | None = None,
    ) -> None:
        if max_cache_len is not None and (max_cache_len := _whole("max_cache_len", max_cache_len)) < 1:
            raise LayoutError(f"max_cache_len: expected at least 1, got {max_cache_len}")
        for name, value in (("exact_prefill", exact_prefill), ("prepare", prepare), ("offload", offload)):
            if not isinstance(value, bool):
                raise UnsupportedError(f"SawCache: expected {name}=True or False, got {value!r}")
        if max_cache_len is not None and offload:
            raise UnsupportedError(
                "SawCache: expected max_cache_len or offload, got both: pages that come and go cannot be compiled"
            )
        model = find_model(config) if isinstance(config, torch.nn.Module) else None
        if model is not None:
            config = model.config
        if not isinstance(config, PretrainedConfig):
            raise UnsupportedError(
                f"SawCache: expected a model of Transformers or its config, got {type(config).__name__}"
            )
        decoder = config.get_text_config(decoder=True)
        windows = layer_windows(config)
        cache_format = format if isinstance(format, CacheFormat) else CacheFormat.parse(format)
        for head_dim in {head_dim_of(layer) for layer in layer_configs(decoder)}:
            cache_format.resolve(head_dim)
        if isinstance(calibration, (str, Path)):
            calibration = Calibration.load(calibration)
        if calibration is not None and not isinstance(calibration, Calibration):
            raise CalibrationError(f"SawCache: expected a Calibration or the path of its file, got {calibration!r}")
        written_with: Calibration | Preparation | None = calibration
        if calibration is None and cache_format.codec == "int4":
            if prepare:
                written_with = Preparation(decoder, cache_format, model)
            else:
                warn_once(UNPREPARED)
        self.settings = _Settings(decoder, cache_format, max_cache_len, exact_prefill, backend, written_with, offload)
        self._register()
        super().__init__(layers=[SawLayer(self.settings, index, window) for index, window in enumerate(windows)])

    def _register(self) -> None:
        self.handle = next(_handles)
        CACHES[self.handle] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle. The new cache has a handle of its own."""
        vars(self).update(state)
        self._register()

    def __deepcopy__(self, memo: dict[int, Any]) -> SawCache:
        """A cache with the same tokens, for example of a prompt with which many conversations begin. Both share the
        model's config.
        """
        memo[id(self.settings.config)] = self.settings.config
        if self.settings.offload and torch.cuda.is_available():
            torch.cuda.synchronize()  # pages may be on their way to the host
        other = object.__new__(type(self))
        memo[id(self)] = other
        for layer in self._saw_layers():  # never changed
            memo.update({id(x): x for x in (layer._calibration, *vars(layer._calibration).values()) if x is not None})
        vars(other).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        other._register()
        return other

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Write or hand over new K and V. Called by the model's attention layers.

        Args:
            key_states, value_states: [batch_size, num_kv_heads, num_new, head_dim], K after RoPE.
            layer_idx: index of the layer.

        Returns:
            For the attention implementation `sawkv`, the same `NewStates` twice, which it writes and reads. For others,
                K and V of all tokens (with a sliding window: of those that its mask covers), decoded: [batch_size,
                num_kv_heads, num_keys, head_dim].

        Raises:
            LayoutError: batch, heads or head_dim differ from those in the cache; there is no room; or layers hold
                different tokens.
            UnsupportedError: K and V differ in shape, have no kernels, or need gradients.
        """
        layer = self.layers[layer_idx]
        assert isinstance(layer, SawLayer)
        refuse_gradients(key_states, value_states)
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        if self.settings.read_by_sawkv:
            states = NewStates(key_states, value_states, layer, self.handle)
            return states, states
        keys, values = layer.update(key_states, value_states)
        return keys, values

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, on the device or the host."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, SawLayer))

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]:
        """K, V and the window of each layer, as DynamicCache gives them: decoded, see `SawLayer.keys`."""
        for layer in self._saw_layers():
            yield *layer.states(), torch.tensor(layer.window) if layer.window else None

    def reset(self) -> None:
        """Forget all tokens. With `max_cache_len` pages are kept, and so are graphs compiled for them."""
        for layer in self._saw_layers():
            layer.reset()
        self.settings.passes = Passes()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens; or, if it is positive, all after that many (Transformers before
        5.18).

        Raises:
            LayoutError: a sliding window no longer has tokens that would be visible again, or the last pass is
                incomplete and larger than the crop. The cache is unchanged.
        """
        tokens_to_remove = _whole("crop", tokens_to_remove)
        pagings = self.settings.pagings.values()
        held = max((paging.length for paging in pagings), default=0)
        length = max(0, held + tokens_to_remove) if tokens_to_remove <= 0 else min(held, tokens_to_remove)
        self.settings.passes.check_whole(held - length)
        for paging in pagings:
            paging.check_crop(length)
        with self.settings.passes.changing("a crop"):
            for paging in pagings:
                paging.crop(length)
            self.settings.passes.take_back(is_empty=length == 0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder or subset the batch to `beam_idx`.

        Raises:
            LayoutError: an index is out of range, or there is none. The cache is unchanged.
        """
        layers = [layer for layer in self._saw_layers() if layer.is_initialized]
        if not layers:
            return
        self.settings.passes.check_whole()
        size, beam_idx = layers[0].batch_size, torch.as_tensor(beam_idx)
        if beam_idx.ndim != 1 or beam_idx.is_floating_point():
            raise LayoutError(f"SawCache: expected a vector of indices, got {beam_idx.dtype} {list(beam_idx.shape)}")
        beam_idx = beam_idx.long()
        outside = beam_idx.device.type == "cpu" and bool(
            ((beam_idx < -size) | (beam_idx >= size)).any()
        )  # a GPU stops by itself
        if not beam_idx.numel() or outside:
            raise LayoutError(f"SawCache: expected sequences from 0 to {size - 1}, got {beam_idx.tolist()}")
        beam_idx = torch.where(beam_idx < 0, beam_idx + size, beam_idx)
        with self.settings.passes.changing("a change of the batch"):
            for layer in layers:
                layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        if (repeats := _whole("batch_repeat_interleave", repeats)) < 1:
            raise LayoutError(f"batch_repeat_interleave: expected at least 1, got {repeats}")
        self.reorder_cache(torch.arange(max(0, self.batch_size)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences, given by index or by one bool per sequence. Errors as in `reorder_cache`."""
        indices = torch.as_tensor(indices)
        if indices.dtype == torch.bool:
            if list(indices.shape) != [self.batch_size] and self.batch_size > 0:
                raise LayoutError(
                    f"SawCache: expected a bool for each of {self.batch_size} sequences, got {list(indices.shape)}"
                )
            indices = indices.nonzero().flatten()
        self.reorder_cache(indices)

    @property
    def batch_size(self) -> int:
        """Number of sequences; -1 before the first pass."""
        return next((layer.batch_size for layer in self._saw_layers() if layer.is_initialized), -1)

    def _saw_layers(self) -> list[SawLayer]:
        return [layer for layer in self.layers if isinstance(layer, SawLayer)]


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise LayoutError(f"{name}: expected a whole number, got {value!r}") from None


class SawLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Pages of one layer. Layers with equal pages and windows share a `Paging`, which the first of them advances."""

    is_croppable = True

    def __init__(self, settings: _Settings, index: int, window: int) -> None:
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

    @torch.compiler.disable  # type: ignore[untyped-decorator]
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
                logger.warning(
                    "sawkv: there are no fast kernels here (`sawkv doctor` says why): attention is right but very slow"
                )
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

    @torch.compiler.disable  # type: ignore[untyped-decorator]
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
            states = self.decode(key_states.dtype, value_states.dtype)
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
        ops.append(k, v, self.pages, paging.slots, backend=paging.backend)

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
        table, seq_lens = paging.tail_table(num_keys, self._held)
        # Each sequence ends at the end of its rows; those before are of the page in which its first key lies, and are
        # cut off.
        rows = num_keys + (layout.page_size if self.window else 0)
        ends = torch.arange(paging.batch_size + 1, dtype=torch.int32, device=paging.device) * rows
        starts = torch.cat([ends[1:] - seq_lens, ends[-1:]])
        shape = paging.batch_size * rows, layout.num_kv_heads, layout.head_dim
        states = torch.zeros((2, *shape), dtype=torch.promote_types(k_dtype, v_dtype), device=paging.device)
        assert self.pages is not None
        ops.gather(self.pages, table, seq_lens, starts, states[0], states[1], rotated=False, backend=paging.backend)
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


@dataclass(eq=False)
class NewStates:
    """New K and V for a layer's pages. `SawCache.update` returns it to our attention function in place of K and of V.

    Attributes:
        key, value: [batch_size, num_kv_heads, num_new, head_dim].
        layer, handle: the layer, and its cache.
    """

    key: torch.Tensor
    value: torch.Tensor
    layer: SawLayer
    handle: int

    def refuse(self) -> NoReturn:
        """Refuse to be read as tensors by anything but our attention function.

        Raises:
            UnsupportedError: always.
        """
        model = self.layer.model_type
        raise UnsupportedError(
            f'sawkv: expected K and V of this {model} to be read by attention implementation "{NAME}" alone, which its'
            f" config names. Either {model} computes attention by itself, or changes K and V before: then call"
            ' model.set_attn_implementation("eager") (or load it so), with which a SawCache works. Or the config is'
            " not that of the model that runs: then use SawCache(model.config) of that same model"
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what Python and PyTorch look for in any object
            raise AttributeError(name)
        self.refuse()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        leaves, _ = torch.utils._pytree.tree_flatten((args, kwargs or {}))
        next(leaf for leaf in leaves if isinstance(leaf, cls)).refuse()


def _refuse(states: NewStates, *args: Any) -> NoReturn:
    states.refuse()


_OPERATORS = (
    "getitem setitem len iter contains neg abs float array add radd sub rsub mul rmul truediv rtruediv floordiv mod pow"
    " matmul rmatmul lt le gt ge and or xor invert"
)
for _operator in _OPERATORS.split():
    setattr(NewStates, f"__{_operator}__", _refuse)


def refuse_gradients(*states: torch.Tensor | None) -> None:
    """Refuse gradients, which cannot pass through pages.

    Raises:
        UnsupportedError: backward or forward differentiation would go through these tensors.
    """
    given = [x for x in states if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise UnsupportedError(
            "SawCache: expected torch.no_grad() or torch.inference_mode() around the model, got Q, K, V or sinks that"
            " require a gradient: pages hold quantized numbers, through which no gradients flow. Train with"
            " use_cache=False"
        )
    if not torch.compiler.is_compiling() and _has_tangent(given):
        raise UnsupportedError(
            "SawCache: expected Q, K and V without tangents, got those of forward-mode differentiation: pages hold"
            " quantized numbers, through which no gradients flow. Differentiate with use_cache=False"
        )


def check_states(key_states: torch.Tensor, value_states: torch.Tensor) -> None:
    """Check new K and V.

    Raises:
        UnsupportedError: K and V differ in shape, have no data, or have a dtype that kernels do not take.
        LayoutError: there is no sequence.
    """
    if key_states.shape != value_states.shape:
        raise UnsupportedError(
            f"SawCache: expected K and V of one shape, got {list(key_states.shape)} and {list(value_states.shape)}"
        )
    if key_states.ndim != 4:
        raise UnsupportedError(f"SawCache: expected K and V of 4 dimensions, got {list(key_states.shape)}")
    if key_states.device != value_states.device or key_states.device.type == "meta":
        raise UnsupportedError(
            f"SawCache: expected K and V with data, on one device, got {key_states.device} and {value_states.device}"
        )
    if not (_has_data(key_states) and _has_data(value_states)):
        raise UnsupportedError(
            f"SawCache: expected K and V with data, got {type(key_states).__name__} without, as of torch.func, vmap or"
            " torch.export"
        )
    for states in (key_states, value_states):
        if states.dtype not in ops.FLOAT_DTYPES:
            raise UnsupportedError(f"SawCache: expected K and V in bfloat16, float16 or float32, got {states.dtype}")
    if key_states.shape[0] == 0:
        raise LayoutError("SawCache: expected at least one sequence, got a batch of 0")


def _has_tangent(states: Iterable[torch.Tensor]) -> bool:
    return any(forward_ad.unpack_dual(x).tangent is not None for x in states)  # type: ignore[no-untyped-call]


def _has_data(x: torch.Tensor) -> bool:
    try:
        return x.data_ptr() != 0 or x.numel() == 0
    except RuntimeError:  # what transforms and tracers wrap
        return False


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[batch_size, heads, tokens, head_dim] as [batch_size * tokens, heads, head_dim]."""
    rows = x.transpose(1, 2).flatten(0, 1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()
