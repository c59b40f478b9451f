"""`SawCache`: a Transformers cache over sawkv's pages."""

from __future__ import annotations

import copy
import itertools
import operator
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._dynamo import mark_dynamic
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from sawkv.errors import CalibrationError, LayoutError, UnsupportedError
from sawkv.format.spec import CacheFormat
from sawkv.integrations.transformers.hybrid import SawHybridLayer, reorder_states
from sawkv.integrations.transformers.layer import SawLayer, Settings
from sawkv.integrations.transformers.models import (
    HYBRID,
    find_model,
    head_dim_of,
    layer_configs,
    layer_types,
    layer_windows,
)
from sawkv.integrations.transformers.passes import Passes
from sawkv.integrations.transformers.prepare import Preparation, warn_once
from sawkv.integrations.transformers.states import NewStates, refuse_gradients
from sawkv.prepare.calibration import Calibration
from sawkv.prepare.model import kv_sources

UNPREPARED = (
    "sawkv: INT4 pages of a model that is not prepared (prepare=False). Keys with a large static part, as in Qwen2.5,"
    " then lose most of their 4 bits: such a model's perplexity can rise manyfold"
)

CACHES: weakref.WeakValueDictionary[int, SawCache] = weakref.WeakValueDictionary()
"""Caches by `SawCache.handle`. A compiled graph can hold a number, and not a cache."""

_handles = itertools.count(2)  # compilers make constants of 0 and 1, also of sizes


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
        prepare: False leaves the model unprepared, which may cost much accuracy. It matters below 8 bits alone.
        offload: keep pages in host memory, and copy those of one layer at a time to the device.
        backend: a name from `sawkv doctor`; None chooses the fastest.

    Raises:
        CalibrationError: the calibration cannot be read; or, at the first pass, is of another model or format.
        UnsupportedError: a layer has something other than causal self-attention, with or without a sliding window, or a
            recurrent state; `max_cache_len` is given for a model with recurrent states or shared K and V; or, at the
            first pass, the model cannot be prepared.
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
        sources = kv_sources(decoder)
        types = layer_types(config)
        if max_cache_len is not None and (None in windows or HYBRID in types or len(windows) < len(sources)):
            raise UnsupportedError(
                f"SawCache: expected no max_cache_len for a {decoder.model_type}: steps with recurrent states, or with"
                " layers that share K and V, are not compiled"
            )
        cache_format = format if isinstance(format, CacheFormat) else CacheFormat.parse(format)
        if cache_format.recent:
            raise UnsupportedError(
                f"SawCache: expected a format without -r{cache_format.recent}, which vLLM alone serves, got"
                f" {cache_format}"
            )
        for head_dim in {head_dim_of(layer) for layer in layer_configs(decoder)}:
            cache_format.resolve(head_dim)
        if isinstance(calibration, (str, Path)):
            calibration = Calibration.load(calibration)
        if calibration is not None and not isinstance(calibration, Calibration):
            raise CalibrationError(f"SawCache: expected a Calibration or the path of its file, got {calibration!r}")
        written_with: Calibration | Preparation | None = calibration
        if calibration is None and cache_format.feeds_back:
            if prepare:
                written_with = Preparation(decoder, cache_format, model)
            else:
                warn_once(UNPREPARED)
        self.settings = Settings(
            decoder, cache_format, max_cache_len, exact_prefill, backend, written_with, offload, sources
        )
        self._register()
        layers: list[Any] = [
            LinearAttentionLayer()
            if window is None
            else (SawHybridLayer if name == HYBRID else SawLayer)(self.settings, index, window)
            for index, (window, name) in enumerate(zip(windows, types, strict=True))
        ]
        super().__init__(layers=layers)

    def _register(self) -> None:
        # A compiler makes a constant of the first number that it sees, and compiles again at the second. A size that is
        # marked so is an argument from the first on.
        self._numbered = torch.empty(next(_handles), 0)
        mark_dynamic(self._numbered, 0)
        CACHES[self.handle] = self

    @property
    def handle(self) -> int:
        """Number of this cache in `CACHES`."""
        return self._numbered.shape[0]

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
        if not -len(self.layers) <= operator.index(layer_idx) < len(self.layers):
            raise UnsupportedError(
                f"SawCache: expected layers 0 to {len(self.layers) - 1}, as the config says, got layer {layer_idx}. Use"
                " SawCache(model.config) of the model that runs"
            )
        layer = self.layers[layer_idx]
        if not isinstance(layer, SawLayer):
            raise UnsupportedError(
                f"SawCache: expected no K and V in layer {layer_idx}, which the config says has no attention"
            )
        refuse_gradients(key_states, value_states)
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        if self.settings.read_by_sawkv:
            states = NewStates(key_states, value_states, layer, self.handle)
            return states, states
        keys, values = layer.update(key_states, value_states)
        return keys, values

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Write a layer's convolution state. Called by layers with recurrent states.

        Raises:
            LayoutError: the last forward pass ended before its first layer of attention. Steps of one token are not
                seen: models change states in place there.
        """
        self.settings.passes.write_state("conv", layer_idx, *args, kwargs.get("state_idx"))
        states: torch.Tensor = super().update_conv_state(conv_states, layer_idx, *args, **kwargs)
        return states

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Write a layer's recurrent state. As `update_conv_state`."""
        self.settings.passes.write_state("recurrent", layer_idx, *args, kwargs.get("state_idx"))
        states: torch.Tensor = super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)
        return states

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
        self.layers = [layer if isinstance(layer, SawLayer) else LinearAttentionLayer() for layer in self.layers]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens; or, if it is positive, all after that many (Transformers before
        5.18).

        Raises:
            LayoutError: a sliding window no longer has tokens that would be visible again, or the last pass is
                incomplete and larger than the crop. The cache is unchanged.
            UnsupportedError: a recurrent state would have to be taken back. The cache is unchanged.
        """
        tokens_to_remove = _whole("crop", tokens_to_remove)
        pagings = self.settings.pagings.values()
        held = max((paging.length for paging in pagings), default=0)
        length = max(0, held + tokens_to_remove) if tokens_to_remove <= 0 else min(held, tokens_to_remove)
        if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers):
            if 0 < length < held:
                raise UnsupportedError(
                    "SawCache: expected a crop to no token, or none, got one to"
                    f" {length} of {held} tokens: recurrent states of {self.settings.config.model_type} cannot be taken"
                    " back. Generate without assistance, or keep a copy.deepcopy of the cache"
                )
            if not length:
                self.reset()
                return
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
        # A GPU stops by itself.
        outside = beam_idx.device.type == "cpu" and bool(((beam_idx < -size) | (beam_idx >= size)).any())
        if not beam_idx.numel() or outside:
            raise LayoutError(f"SawCache: expected sequences from 0 to {size - 1}, got {beam_idx.tolist()}")
        beam_idx = torch.where(beam_idx < 0, beam_idx + size, beam_idx)
        with self.settings.passes.changing("a change of the batch"):
            for layer in layers:
                layer.reorder_cache(beam_idx)
            for state in self.layers:
                if isinstance(state, LinearAttentionLayer):
                    reorder_states(state, beam_idx)

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
