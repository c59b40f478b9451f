"""Bytes of a model's weights on GPUs: measured in its files, reported by the hub, or counted from its shape."""

from __future__ import annotations

import fnmatch
import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from sawkv.capacity.model import ModelShape
from sawkv.checkpoint import Checkpoint, damaged, read_header
from sawkv.errors import SawkvError, UnsupportedError

STORED_BYTES: Final = {"F64": 2, "F32": 2, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2}
"""Bytes on the GPU of a safetensors dtype; vLLM serves fp32 weights in 16 bits. All others take 1."""

_LAYER: Final = re.compile(r"(?:model\.|language_model\.)*(?:layers|h|blocks)\.(\d+)\.")
_TOWER: Final = re.compile(
    r"(?:^|\.)(?:visual|vision\w*|audio\w*|speech\w*|embed_(?:vision|audio)|multi_modal_projector|mm_projector)\."
)


@dataclass(frozen=True)
class Weights:
    """Bytes of all weights on all GPUs together, and the source of the figure."""

    nbytes: int
    source: str


def weights_of(checkpoint: Checkpoint, shape: ModelShape, language_model_only: bool = False) -> Weights:
    """The most exact figure available.

    Args:
        language_model_only: leave out the parts that read images and audio, as vLLM does with this option.

    Raises:
        SawkvError: a weight file is damaged.
        UnsupportedError: no source gives the size.
    """
    if checkpoint.folder is not None:
        measured = _measure(checkpoint.folder, _is_loaded(shape, language_model_only))
        if measured is not None:
            return measured
    counted = None if language_model_only else checkpoint.hub_dtypes()
    if counted is not None:
        return Weights(sum(count * STORED_BYTES.get(dtype, 1) for dtype, count in counted.items()), "told by the hub")
    return _count(checkpoint, shape, _is_loaded(shape, language_model_only))


def _is_loaded(shape: ModelShape, language_model_only: bool) -> Callable[[str], bool]:
    """Whether vLLM loads the weight with a given name. It skips draft layers after the last layer, and a tied output
    layer.
    """
    decoder = shape.config.get_text_config(decoder=True)

    def is_loaded(name: str) -> bool:
        layer = _LAYER.match(name)
        drafts = name.startswith("mtp.") or (layer is not None and int(layer[1]) >= decoder.num_hidden_layers)
        unused = (shape.ties and name.endswith("lm_head.weight")) or (language_model_only and _TOWER.search(name))
        return not drafts and not unused

    return is_loaded


def _measure(folder: Path, is_loaded: Callable[[str], bool]) -> Weights | None:
    """From the headers of safetensors files, or from their index if files are missing. None without either."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            content = json.loads(index.read_bytes())
            files = [folder / name for name in sorted(set(content["weight_map"].values()))]
            total = int(content.get("metadata", {}).get("total_size") or 0)
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError) as error:
            raise SawkvError(f"plan: expected an index of safetensors files in {index}, got: {error!r}") from error
        if not all(file.is_file() for file in files):
            return Weights(total, "told by the index of their files") if total else None
    else:
        files = [folder / "model.safetensors"]
        if not files[0].is_file():
            files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    return Weights(sum(_file_bytes(file, is_loaded) for file in files), "measured in their files")


def _file_bytes(file: Path, is_loaded: Callable[[str], bool]) -> int:
    """Bytes that the tensors of a safetensors file take on the GPU, from its header."""
    try:
        tensors = [tensor for name, tensor in read_header(file)[0].items() if is_loaded(name)]
        sizes = [
            prod(map(operator.index, tensor["shape"])) * STORED_BYTES.get(tensor["dtype"], 1) for tensor in tensors
        ]
        if min(sizes, default=0) < 0 or sum(sizes) >= 1 << 63:
            raise ValueError("sizes that no file has")
        return sum(sizes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(file) from error


def _count(checkpoint: Checkpoint, shape: ModelShape, is_loaded: Callable[[str], bool]) -> Weights:
    """From the parameters of Transformers' model, created without memory, and the bits of the checkpoint's
    quantization.
    """
    import torch

    model_class = _model_class(checkpoint.config, shape.config)
    try:
        with torch.device("meta"):
            model = model_class(shape.config)
    except Exception as error:  # a config that is wrong fails anywhere in it
        reason = f"expected a config.json of which Transformers makes a model, got: {error!r:.300}"
        raise UnsupportedError(f"plan: {reason}: give --weights SIZE") from error
    quantization = _quantization(checkpoint.config)
    bits, source = 16.0, "counted from the shape, in 16 bits"
    quantized: set[str] = set()
    if quantization:
        try:
            bits, is_kept = _linear_bits(quantization), _kept_in_16_bits(quantization)
        except UnsupportedError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
            reason = f"expected a quantization_config of a known form, got: {error!r:.300}"
            raise UnsupportedError(f"plan: {reason}: give --weights SIZE") from error
        source = f"counted from the shape, linear layers in {bits:.3g} bits ({quantization.get('quant_method')})"
        quantized = {name for name in _linear_weights(model) if not is_kept(name)}
    nbytes = sum(
        parameter.numel() * (bits if name in quantized else 16) / 8
        for name, parameter in model.named_parameters()
        if is_loaded(name)
    )
    return Weights(int(nbytes), source)


def _model_class(config: Mapping[str, Any], made: Any) -> Any:
    """Transformers' class that config.json names, else the one for its model type."""
    import transformers
    from transformers.models.auto import modeling_auto

    types = [
        getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}).get(made.model_type)
        for task in ("MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "CAUSAL_LM")
    ]
    named = config.get("architectures")
    for name in [*(named if isinstance(named, list) else ()), *types]:
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    raise UnsupportedError(
        f"plan: expected a model class in Transformers, got none for {made.model_type}: give --weights SIZE"
    )


def _linear_weights(model: Any) -> Iterator[str]:
    """Names of the weights of linear layers, stacked experts included."""
    from torch import nn

    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            stacked = parameter.ndim == 3 and not isinstance(module, nn.Conv1d)
            if stacked or (isinstance(module, nn.Linear) and name == "weight"):
                yield f"{prefix}.{name}"


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The quantization in config.json, at any place where vLLM looks; empty in 16 bits."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if isinstance(place.get(key), dict):
                found: dict[str, Any] = place[key]
                return found
    return {}


def _linear_bits(quantization: Mapping[str, Any]) -> float:
    """Bits that one weight of a quantized linear layer takes, with its share of scales and zero points.

    Raises:
        UnsupportedError: the method is not known here.
    """
    method = str(quantization.get("quant_method", "")).replace("_", "-")
    if method in ("awq", "gptq", "auto-round"):
        return _grouped(quantization.get("bits", 4), quantization.get("group_size", 128), zero_points=True)
    if method in ("fp8", "fbgemm-fp8"):
        return 8
    if method == "mxfp4":
        return _grouped(4, 32, scale_bits=8)
    if method == "bitsandbytes":
        return 4.5 if quantization.get("load_in_4bit") else 8
    if method.startswith("modelopt"):
        return _grouped(4, 16, scale_bits=8) if "FP4" in str(quantization).upper() else 8
    weights = [group["weights"] for group in (quantization.get("config_groups") or {}).values() if group.get("weights")]
    if method == "compressed-tensors" and weights:
        return max(
            _grouped(
                kind["num_bits"],
                kind.get("group_size"),
                scale_bits=8 if kind.get("type") == "float" and kind["num_bits"] == 4 else 16,
                zero_points=not kind.get("symmetric", True),
            )
            for kind in weights
        )
    raise UnsupportedError(
        f"plan: expected weights quantized in a known way, got {method or 'no name'}: give --weights SIZE"
    )


def _grouped(bits: int, group_size: int | None, scale_bits: int = 16, zero_points: bool = False) -> float:
    return bits + ((scale_bits + bits * zero_points) / group_size if group_size and group_size > 0 else 0)


def _kept_in_16_bits(quantization: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether the quantization leaves out the parameter of this name: the output layer, and what its config lists."""
    patterns = []
    for key in ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules"):
        for entry in quantization.get(key) or ():
            if entry.startswith("re:"):
                patterns.append(re.compile(entry[3:]))
            else:
                patterns.append(
                    re.compile(fnmatch.translate(f"*{entry}*") if "*" in entry else f".*{re.escape(entry)}[._]")
                )
    return lambda name: name.endswith("lm_head.weight") or any(pattern.match(name) for pattern in patterns)
