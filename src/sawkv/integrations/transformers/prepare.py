"""Prepares a loaded model at the first use of one of its caches, on text that ships with sawkv.

A cache knows only its model's config. A global PyTorch hook on forward passes finds the model with that config before
the pass computes anything, and is then removed. The model runs the text without cache and gradients, in evaluation
mode, with an attention function that records Q, K and V. Afterwards all of this is restored.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

from sawkv.errors import SawkvError, UnsupportedError
from sawkv.format.spec import CacheFormat
from sawkv.integrations.transformers.models import NAME, layer_windows
from sawkv.integrations.transformers.stored import Entry, state_of
from sawkv.prepare import corpus
from sawkv.prepare.calibration import LayerCalibration
from sawkv.prepare.corpus import NUM_WINDOWS, WINDOW
from sawkv.prepare.fit import fit
from sawkv.prepare.linear import LinearInFp32
from sawkv.prepare.model import kv_sources, output_weight
from sawkv.prepare.statistics import LayerStatistics
from sawkv.prepare.turning import bucketed_context

logger = logging.getLogger(__name__)

_lock = threading.RLock()
_running = threading.local()
_prepared: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, tuple[str, list[LayerCalibration]]]] = (
    weakref.WeakKeyDictionary()
)
"""By language model and format: the state of the weights, and what was fitted to them."""


class _Hook:
    """Tells a preparation of passes. In copies and pickles of a model it tells none."""

    def __init__(self, preparation: Preparation | None = None) -> None:
        self._preparation = None if preparation is None else weakref.ref(preparation)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: Any) -> None:
        preparation = None if self._preparation is None else self._preparation()
        if preparation is not None:
            preparation._see(module)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


class Preparation:
    """The calibration of one cache and its copies, fitted at the first forward pass of its model.

    Args:
        decoder: the language model's config, the same object as in the model.
        cache_format: one that feeds errors back.
        model: the model, if the caller has it; None finds it.
    """

    def __init__(
        self, decoder: PretrainedConfig, cache_format: CacheFormat, model: PreTrainedModel | None = None
    ) -> None:
        self._decoder, self._format = decoder, cache_format
        self._model = None if model is None else weakref.ref(model)
        self._layers: list[LayerCalibration] | None = None
        self._error = (
            "expected a forward pass of the model before, got K and V of another. Use SawCache(model), or"
            " SawCache(model.config) with the config of that same model"
        )
        if model is None:
            handle = nn.modules.module.register_module_forward_pre_hook(_Hook(self))
        else:
            handle = trunk_of(model).register_forward_pre_hook(_Hook(self))
        self._stop_waiting = weakref.finalize(self, handle.remove)

    def __deepcopy__(self, memo: dict[int, Any]) -> Preparation:
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the hook that waits for a model."""
        return vars(self) | {"_stop_waiting": None, "_model": None}

    def layer(self, index: int) -> LayerCalibration:
        """The calibration of one layer.

        Raises:
            UnsupportedError: the model was not found, or could not be prepared.
        """
        if self._layers is None:
            raise UnsupportedError(
                f"SawCache: this {self._decoder.model_type} could not be prepared for {self._format}: {self._error}."
                ' SawCache(model.config, "int8") needs no preparation; SawCache(model.config, prepare=False) goes'
                " without, which may cost much accuracy"
            )
        return self._layers[index]

    def _see(self, module: nn.Module) -> None:
        """Called by PyTorch when a module is about to run."""
        model = getattr(module, "_orig_mod", module)  # of torch.compile
        if not isinstance(model, PreTrainedModel) or model.config.get_text_config(decoder=True) is not self._decoder:
            return
        if self._layers is not None or getattr(_running, "recorder", None) is not None:
            return
        given = None if self._model is None else self._model()
        try:
            self._layers = prepared(given or model, self._decoder, self._format)
        except Exception as error:  # the pass that runs need not be for the cache; `layer` says it to those that are
            logger.debug("sawkv: preparation failed", exc_info=True)
            self._error = f"{error}" if isinstance(error, SawkvError) else f"{type(error).__name__}: {error}"
            if not isinstance(error, SawkvError):  # out of memory, or a pass without data: the next one may succeed
                return
        self._stop_waiting()


def prepared(model: PreTrainedModel, decoder: PretrainedConfig, cache_format: CacheFormat) -> list[LayerCalibration]:
    """The calibration of each layer: fitted now, fitted earlier for another cache, or found on disk.

    Args:
        model: on its devices. It is left unchanged.
        decoder: its language model's config.
        cache_format: one that feeds errors back.

    Raises:
        UnsupportedError: the model does not attend through Transformers' AttentionInterface, or its Q, K or V is not
            finite.
    """
    with _lock, torch.device("cpu"):  # whatever the caller's torch.set_default_device is
        name, state = str(cache_format), state_of(trunk_of(model))
        held = _prepared.setdefault(trunk_of(model), {})
        if name not in held or held[name][0] != state:
            held[name] = state, _prepare(model, decoder, cache_format)
        return held[name][1]


def _prepare(model: PreTrainedModel, decoder: PretrainedConfig, cache_format: CacheFormat) -> list[LayerCalibration]:
    started = time.monotonic()
    context = corpus.context_of(decoder)
    window = min(WINDOW, context)
    windows, positions = _windows(model, decoder, window), corpus.preparation_positions(NUM_WINDOWS, window, context)
    entry = Entry(trunk_of(model), decoder, cache_format, windows, positions, _folder_of(model, decoder))
    layers, source = entry.load()
    if layers is None:
        statistics = measure(trunk_of(model), decoder, windows, positions, context)
        layers = [LayerCalibration()] * len(statistics)
        devices = {i: layer.sums.device for i, layer in enumerate(statistics) if layer is not None}
        for device in dict.fromkeys(devices.values()):
            there = {i: layer for i, layer in enumerate(statistics) if layer is not None and devices[i] == device}
            for i, fitted in zip(there, fit(list(there.values()), cache_format), strict=True):
                layers[i] = fitted
        source = f"on {NUM_WINDOWS} windows of {window} tokens, {entry.save(layers)}"
    logger.info("sawkv: the model was prepared in %.1f s %s", time.monotonic() - started, source)
    return layers


@torch.inference_mode(False)
@torch.no_grad()
def measure(
    trunk: PreTrainedModel, decoder: PretrainedConfig, windows: torch.Tensor, positions: torch.Tensor, context: int
) -> list[LayerStatistics | None]:
    """Run a language model on text, and gather statistics of its attention layers; None for layers without attention.

    Args:
        trunk: the model without its output embedding. It is left unchanged.
        decoder: its config.
        windows, positions: [num_windows, window] int64, token ids and positions.
        context: positions that will be served.

    Raises:
        UnsupportedError: a layer did not attend through our function.
    """
    device = _embedding(trunk).device
    accepted = inspect.signature(trunk.forward).parameters
    context = bucketed_context(decoder, context)
    recorder = _Recorder(layer_windows(decoder), kv_sources(decoder), context)
    with _left_as_it_was(trunk), torch.compiler.set_stance("force_eager"), LinearInFp32():
        _running.recorder = recorder
        try:
            for each in corpus.passes(windows.cpu(), positions.cpu(), context):
                recorder.running = each
                inputs = {
                    "input_ids": each.ids.to(device)[None],
                    "position_ids": each.positions.to(device)[None],
                    "attention_mask": torch.ones_like(each.ids, device=device)[None],
                }
                trunk(**{name: x for name, x in inputs.items() if name in accepted}, use_cache=False)
        finally:
            _running.recorder = None
    windows_of = layer_windows(decoder)
    missing = [index for index, layer in enumerate(recorder.layers) if layer is None and windows_of[index] is not None]
    if missing:
        raise UnsupportedError(
            f"expected all attention layers of {type(trunk).__name__} to use Transformers' AttentionInterface, got"
            f" {len(missing)} of {len(recorder.layers)} that do not"
        )
    return recorder.layers


def note(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> None:
    """Add a layer's Q, K and V to the measurement that runs in this thread, if any. Shapes as in `saw_attention`."""
    recorder: _Recorder | None = getattr(_running, "recorder", None)
    if recorder is not None:
        recorder.add(module, query, key, value, scale)


class _Recorder:
    """Statistics of all layers that have K and V of their own. `windows`: the sliding window of each such layer, None
    without attention; `sources`: as of `kv_sources`; `context`: as of `LayerStatistics`; `running`: the pass that runs.
    """

    def __init__(self, windows: Sequence[int | None], sources: Sequence[int], context: int) -> None:
        self._windows, self._sources, self._context = windows, sources, context
        self.running: corpus.Pass | None = None
        self.layers: list[LayerStatistics | None] = [None] * len(windows)

    def add(self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> None:
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or not 0 <= index < len(self._sources):
            raise UnsupportedError(
                f"expected attention layers that know their index, got {type(module).__name__} with {index!r}"
            )
        if key.shape != value.shape:
            raise UnsupportedError(f"expected K and V of one shape, got {list(key.shape)} and {list(value.shape)}")
        index = self._sources[index]
        layer = self.layers[index]
        if layer is None:
            _, num_kv_heads, _, head_dim = key.shape
            layer = self.layers[index] = LayerStatistics(
                num_kv_heads, head_dim, key.device, scale, self._windows[index] or 0, self._context
            )
            weight = output_weight(module, query.shape[1] * head_dim)
            if weight is not None:
                layer.set_output_weight(weight.to(key.device))
        assert self.running is not None
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        layer.add(q, k, v, self.running.positions, self.running.is_probe)


@contextlib.contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in evaluation mode and attends by our function. All of it is restored afterwards,
    also rotary embeddings that grew with the text.
    """
    training = {module: module.training for module in model.modules()}
    configs = {
        id(config): config
        for module in model.modules()
        if isinstance(config := getattr(module, "config", None), PretrainedConfig)
    }
    attention = {name: config._attn_implementation for name, config in configs.items()}
    rotary = [module for module in model.modules() if "rotary" in type(module).__name__.lower()]
    held = [
        (module, dict(vars(module)), {name: (x, copy.deepcopy(x)) for name, x in module._buffers.items()})
        for module in rotary
    ]
    try:
        for module in training:
            module.training = False
        for config in configs.values():
            config._attn_implementation_internal = NAME  # as Transformers does it, which leaves the configs below alone
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for key, config in configs.items():
            config._attn_implementation_internal = attention[key]
        for module, attributes, buffers in held:
            vars(module).clear()
            vars(module).update(attributes)
            for name, (buffer, content) in buffers.items():
                module._buffers[name] = buffer
                if buffer is not None and content is not None and not torch.equal(buffer, content):
                    buffer.copy_(content)


def trunk_of(model: PreTrainedModel) -> PreTrainedModel:
    """The language model within a model, without embeddings of images and the output embedding."""
    trunk: PreTrainedModel = model.get_decoder()  # type: ignore[no-untyped-call]
    return trunk


def _windows(model: PreTrainedModel, decoder: PretrainedConfig, window: int) -> torch.Tensor:
    """Windows of text in the model's tokens, or of random tokens if its tokenizer is not on this machine: [NUM_WINDOWS,
    window] int64.
    """
    encoder = _encoder(next((name for name in (model.name_or_path, decoder._name_or_path) if name), None))
    vocab_size = int(_embedding(trunk_of(model)).shape[0])
    if encoder is not None:
        windows = corpus.preparation_windows(encoder[0], window, NUM_WINDOWS, encoder[1])
        if int(windows.max()) < vocab_size:
            return windows
    warn_once(
        f"sawkv: found no tokenizer of this {decoder.model_type} on this machine. "
        "It is prepared on random tokens, which is worse than on text"
    )
    return corpus.random_windows(vocab_size, window, NUM_WINDOWS)


def _embedding(model: PreTrainedModel) -> torch.Tensor:
    weight: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return weight


def _encoder(name: str | None) -> tuple[Callable[[str], list[int]], list[int]] | None:
    """The encoder without special tokens, and the special tokens before a text; None if this machine has no tokenizer
    of that name.
    """
    if name is None:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception:  # no such folder, no tokenizer in it, a package missing, code that would have to be run
        logger.debug("sawkv: no tokenizer", exc_info=True)
        return None

    def encode(text: str, special: bool = False) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    if not encode("a"):  # Transformers makes an empty tokenizer for a folder that holds none
        return None
    return encode, corpus.tokens_before(encode, functools.partial(encode, special=True))


def _folder_of(model: PreTrainedModel, decoder: PretrainedConfig) -> Path | None:
    """Folder of the checkpoint that a model was loaded from, if it is on this machine."""
    name = model.name_or_path or decoder._name_or_path
    if not name:
        return None
    try:
        found = None if Path(name).is_dir() else try_to_load_from_cache(name, "config.json")
    except ValueError:  # not a name of the hub
        return None
    folder = Path(found).parent if isinstance(found, str) else Path(name)
    return folder if folder.is_dir() else None


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning once per process."""
    logger.warning(message)
