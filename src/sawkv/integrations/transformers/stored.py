"""Calibrations of a loaded model on disk, and digests of its weights, by which they are found."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from sawkv.errors import SawkvError
from sawkv.format.spec import CacheFormat
from sawkv.integrations.transformers.models import head_dim_of, layer_configs, layer_windows
from sawkv.prepare.calibration import Calibration, LayerCalibration
from sawkv.prepare.store import (
    CalibrationStore,
    contents_digest,
    expectations,
    listed,
    load_shipped,
    make_key,
    shipped_paths,
)

SAMPLED: Final = 64
"""Numbers of a large weight that are compared to notice a change since the last preparation. Small weights are compared
in full.
"""
SMALL: Final = 4096
PIECE: Final = 1 << 14
"""Words of 4 bytes per partial sum."""
PIECES: Final = 1 << 9
"""Partial sums computed at a time, in 64 MB."""

logger = logging.getLogger(__name__)


class Entry:
    """Stored calibrations of this model, in its folder or in the user's cache, or the reason why none can be stored.
    There is one for each shape of layers, and all or none are used.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decoder: PretrainedConfig,
        cache_format: CacheFormat,
        windows: torch.Tensor,
        positions: torch.Tensor,
        folder: Path | None,
    ) -> None:
        self._model, self._decoder, self._folder = model, decoder, folder
        self._store: CalibrationStore | None = None
        self._device, windows_of = model.device, layer_windows(decoder)
        self._shapes = [
            None if window is None else (_kv_heads(layer), head_dim_of(layer))
            for layer, window in zip(layer_configs(decoder), windows_of, strict=False)
        ]
        shapes = sorted({shape for shape in self._shapes if shape is not None})
        self._expected = expectations(cache_format, decoder, shapes)
        self._text = {"windows": _digest(windows), "positions": _digest(positions)}
        try:
            self._store = CalibrationStore(log=logger)
        except (SawkvError, OSError) as error:
            self._reason = str(error)

    @functools.cached_property
    def _entries(self) -> dict[str, dict[str, Any]]:
        """What is expected of the entries in the store, by key; none if the weights are not in memory. Reads all
        weights, so it is computed only if needed.
        """
        model = self._model
        weights = weights_digest(dict(itertools.chain(model.named_parameters(), model.named_buffers())))
        if weights is None:
            self._reason = "its weights are not in memory"
            return {}
        config = {
            key: x
            for key, x in self._decoder.to_dict().items()
            if key not in ("_name_or_path", "transformers_version", "use_cache")
        }
        computation = {
            "config": config,
            "adapters": _adapters(model),
            "dtype": str(model.dtype),
            "engine": f"transformers {transformers.__version__}",
            "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        }
        measured = {**self._text, **computation, "weights": weights}
        return {make_key({**expected, **measured}): expected for expected in self._expected}

    def load(self) -> tuple[list[LayerCalibration] | None, str]:
        """Stored calibrations by layer, and where they were found."""
        found = self._load_shipped()
        if found and self._folder is not None:
            source = f"{listed(shipped_paths(self._folder, self._expected))}, which came with the model"
        else:
            found = [] if self._store is None else self._store.load_all(self._entries)
            source = "" if self._store is None else listed(map(self._store.path, self._entries))
        if not found:
            return None, ""
        by_shape = {(part.num_kv_heads, part.head_dim): part for part in found}
        layers = [
            LayerCalibration() if shape is None else by_shape[shape].layer(i).to(self._device)
            for i, shape in enumerate(self._shapes)
        ]
        return layers, f"from {source}"

    def _load_shipped(self) -> list[Calibration]:
        """The checkpoint's own calibrations, if they are for the weights in its files, and these equal the weights in
        memory.
        """
        if self._folder is None or not any(path.exists() for path in shipped_paths(self._folder, self._expected)):
            return []
        try:
            found = load_shipped(self._folder, contents_digest(self._folder) or "", self._expected, log=logger)
            if not found or _is_as_loaded(self._model, self._decoder, self._folder):
                return found
        except (OSError, RuntimeError, TypeError) as error:  # RuntimeError, TypeError: weights that are not in memory
            logger.debug("sawkv: %s", error)
        logger.info(
            "sawkv: the preparation that came with the model is not used: the model in memory is not the one in its"
            " files"
        )
        return []

    def save(self, layers: list[LayerCalibration]) -> str:
        """Store the calibrations if possible, and say where, or why not."""
        if self._store is None or not self._entries:
            return f"not kept on disk: {self._reason}"
        paths = []
        try:
            for key, expected in self._entries.items():
                shape = expected["num_kv_heads"], expected["head_dim"]
                alike = {i: layer for i, layer in enumerate(layers) if self._shapes[i] == shape}
                calibration = Calibration.from_layers(
                    expected["cache_format"], expected["model"], expected["num_layers"], alike
                )
                calibration.check(**expected)
                paths.append(self._store.save(key, calibration))
        except SawkvError as error:
            return f"not kept on disk: {error}"
        return f"kept in {listed(paths)}"


def _is_as_loaded(trunk: PreTrainedModel, decoder: PretrainedConfig, folder: Path) -> bool:
    """Whether a language model in memory equals the one in a folder's safetensors files, rounded to its dtype, and has
    no adapters.

    Raises:
        OSError: a file cannot be read.
    """
    ignored = ("_name_or_path", "transformers_version", "use_cache", "dtype", "architectures")
    try:
        there = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config(decoder=True)
    except ValueError:  # of a model that brings its own code
        return False
    configs = [{key: x for key, x in config.to_dict().items() if key not in ignored} for config in (there, decoder)]
    if configs[0] != configs[1] or any(_adapters(trunk)):
        return False
    missing = dict(trunk.state_dict())
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                mine = next((end for end in _ends(name) if end in missing), None)
                if mine is None:
                    continue
                x, y = missing.pop(mine), file.get_tensor(name)
                if x.shape != y.shape or not torch.equal(x, y.to(x.device, x.dtype)):
                    return False
    return not missing


def _ends(name: str) -> Iterator[str]:
    """A name in a file, and its ends: `model.layers.0.x`, `layers.0.x`, `0.x`, `x`."""
    while name:
        yield name
        name = name.partition(".")[2]


def _kv_heads(layer: PretrainedConfig) -> int:
    return int(getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads)


def _digest(x: torch.Tensor) -> str:
    return hashlib.sha256(x.numpy().tobytes()).hexdigest()


def state_of(model: nn.Module) -> str:
    """A digest that changes with weights or active adapters. It samples each weight, so it is cheap."""
    packed = [x for x in model.buffers() if not x.is_floating_point()]  # weights of some quantized models
    tensors = [*model.parameters(), *packed]
    known = [(id(x), x.data_ptr() if x.device.type != "meta" else 0, tuple(x.shape), str(x.dtype)) for x in tensors]
    samples: dict[torch.device, list[torch.Tensor]] = {}
    for x in tensors:
        # Packed weights that are no plain tensors.
        with contextlib.suppress(RuntimeError, NotImplementedError, TypeError):
            if x.device.type != "meta" and x.numel():
                step = max(1, x.numel() // SAMPLED) if x.numel() > SMALL else 1
                taken = x.detach().reshape(-1)[::step].contiguous().view(torch.uint8)
                samples.setdefault(x.device, []).append(taken)
    digest = hashlib.sha256(repr((known, _adapters(model))).encode())
    for parts in samples.values():
        digest.update(torch.cat(parts).cpu().numpy().tobytes())
    return digest.hexdigest()


def weights_digest(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """A digest of names, shapes, dtypes and all bytes of tensors, computed on their devices; None if some are not in
    memory.

    Each piece of bytes is summed modulo 2^64, every 4 bytes with a factor of their own. SHA-256 is taken over the sums.
    """
    digest, factors = (
        hashlib.sha256(),
        torch.randint(-(2**62), 2**62, (PIECE,), generator=torch.Generator().manual_seed(1)) | 1,
    )
    for name, x in sorted(tensors.items()):
        try:
            if x.device.type == "meta":
                return None
            content = x.detach().contiguous().reshape(-1).view(torch.uint8)
        except (RuntimeError, NotImplementedError, TypeError):  # packed in a way of their own
            return None
        factors = factors.to(x.device)
        digest.update(f"{name} {list(x.shape)} {x.dtype} ".encode())
        for block in torch.split(content, 4 * PIECE * PIECES):
            words = nn.functional.pad(block, (0, -block.numel() % (4 * PIECE))).view(torch.int32).view(-1, PIECE)
            digest.update((words * factors).sum(1).cpu().numpy().tobytes())
    return digest.hexdigest()


def _adapters(model: nn.Module) -> list[str]:
    """Attributes of PEFT's layers that choose among the weights they hold."""
    names = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    layers = (module for module in model.modules() if type(module).__module__.startswith("peft."))
    return [repr([getattr(layer, name, None) for name in names]) for layer in layers]
