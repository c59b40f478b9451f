"""The calibration file: static centers of K and V for one model and one format, as safetensors. See docs/calibration.md.

A center c is subtracted before rotation. It changes nothing but the error of quantization: softmax(q.(k - c)) = softmax(q.k), since q.c is
the same for every key, and V's center is added back to the output. `sawkv calibrate` makes the file; the engines load it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sawkv.errors import CalibrationError, FormatError
from sawkv.spec import FORMAT_VERSION, CacheFormat

VERSION: Final = "1"
MAX_FILE_BYTES: Final = 64 << 20
"""More than the largest model of today needs: 128 layers of 128 KV heads of 256 channels take half of it."""
MAX_CENTER: Final = 65504.0
"""The largest fp16: what a 16-bit model may compute."""

_TENSORS: Final = ("k_center", "v_center")
_KEYS: Final = ("version", "format", "model", "num_layers", "num_kv_heads", "head_dim", "fingerprint", "made_by")


@dataclass(frozen=True, eq=False)
class Calibration:
    """Centers of all layers.

    Attributes:
        format: what the centers were fitted for, with its rotation orders.
        model: `model_id` of the model they were measured on.
        k_center, v_center: [num_layers, num_kv_heads, head_dim] fp32 on the CPU, for the whole model. Zeros center nothing.

    Raises:
        CalibrationError: a tensor or the format is not as said.
    """

    format: CacheFormat
    model: str
    k_center: torch.Tensor
    v_center: torch.Tensor

    def __post_init__(self) -> None:
        for name, center in (("k_center", self.k_center), ("v_center", self.v_center)):
            if center.dtype != torch.float32 or center.ndim != 3 or not center.numel() or center.device.type != "cpu":
                raise CalibrationError(
                    f"{name}: expected float32 [num_layers, num_kv_heads, head_dim] on the CPU, "
                    f"got {center.dtype} {list(center.shape)} on {center.device}"
                )
            if not bool((center.abs() <= MAX_CENTER).all()):  # NaN fails too
                raise CalibrationError(f"{name}: expected finite values up to {MAX_CENTER:g}, got NaN, infinity or larger")
        if self.k_center.shape != self.v_center.shape:
            raise CalibrationError(
                f"centers: expected equal shapes of K and V, got {list(self.k_center.shape)} and {list(self.v_center.shape)}"
            )
        try:
            resolved = self.format.resolve(self.head_dim)
        except FormatError as error:
            raise CalibrationError(f"format {self.format}: {error}") from error
        if resolved != self.format:
            raise CalibrationError(f"format: expected rotation orders, for example {resolved}, got {self.format}")

    @property
    def num_layers(self) -> int:
        return self.k_center.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.k_center.shape[1]

    @property
    def head_dim(self) -> int:
        return self.k_center.shape[2]

    @property
    def centers_keys(self) -> bool:
        """Whether any key is moved: where sinks or a soft-cap act on scores, centered keys would change the softmax."""
        return bool(self.k_center.any())

    def fingerprint(self) -> str:
        """16 hex digits over all that changes the bytes of a cache, and over the model."""
        digests = [hashlib.sha256(center.contiguous().numpy().tobytes()).hexdigest() for center in (self.k_center, self.v_center)]
        text = "|".join(
            [
                f"sawkv/{FORMAT_VERSION}",
                f"calibration/{VERSION}",
                str(self.format),
                f"model={self.model}",
                f"shape={'x'.join(map(str, self.k_center.shape))}",
                f"k_center={digests[0]}",
                f"v_center={digests[1]}",
            ]
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def check(self, *, cache_format: CacheFormat, model: str, num_layers: int, num_kv_heads: int, head_dim: int) -> None:
        """Refuse a cache or a model that the centers were not made for.

        Args:
            cache_format: of the cache.
            model: `model_id` of the model that is served.
            num_layers, num_kv_heads: of the whole model, not of one rank.
            head_dim: channels in a head.

        Raises:
            CalibrationError: something differs; the message names all that does.
        """
        wanted = {
            "format": str(cache_format.resolve(head_dim)),
            "layers": num_layers,
            "KV heads": num_kv_heads,
            "head_dim": head_dim,
            "model": model,
        }
        got = {
            "format": str(self.format),
            "layers": self.num_layers,
            "KV heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "model": self.model,
        }
        wrong = [f"{name}: expected {wanted[name]}, got {got[name]}" for name in wanted if wanted[name] != got[name]]
        if wrong:
            raise CalibrationError(f"the calibration file is made for something else; {'; '.join(wrong)}. `sawkv calibrate` makes one")

    def centers(self, layer: int, heads: slice = slice(None)) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Centers of K and V for a layer's KV heads, two of [heads, head_dim] fp32 on the CPU; None where nothing is to be subtracted.

        Raises:
            CalibrationError: there is no such layer or head.
        """
        if not 0 <= layer < self.num_layers:
            raise CalibrationError(f"layer: expected 0 to {self.num_layers - 1}, as the calibration file has them, got {layer}")
        if heads.stop is not None and heads.stop > self.num_kv_heads:
            raise CalibrationError(f"KV heads: expected up to {self.num_kv_heads}, as the calibration file has them, got {heads.stop}")
        k, v = (center[layer, heads].clone() for center in (self.k_center, self.v_center))
        return k if k.any() else None, v if v.any() else None

    def save(self, path: str | Path) -> None:
        """Write the file."""
        metadata = {
            "version": VERSION,
            "format": str(self.format),
            "model": self.model,
            "num_layers": str(self.num_layers),
            "num_kv_heads": str(self.num_kv_heads),
            "head_dim": str(self.head_dim),
            "fingerprint": self.fingerprint(),
            "made_by": f"sawkv {importlib.metadata.version('sawkv')}",
        }
        save_file({"k_center": self.k_center.contiguous(), "v_center": self.v_center.contiguous()}, path, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read and check a file. Nothing in it is executed, and nothing is allocated before its size is known to be small.

        Raises:
            CalibrationError: it is missing, damaged, too large, or not a calibration file.
        """
        try:
            return cls._load(Path(path))
        except CalibrationError as error:
            raise CalibrationError(f"calibration file {path}: {error}") from error

    @classmethod
    def _load(cls, path: Path) -> Calibration:
        try:
            size = path.stat().st_size
        except (OSError, ValueError) as error:  # ValueError: a path that holds a null byte
            raise CalibrationError(f"cannot be read: {getattr(error, 'strerror', error)}") from error
        if not path.is_file() or size > MAX_FILE_BYTES:
            raise CalibrationError(f"expected a file of at most {MAX_FILE_BYTES} bytes, got {size if path.is_file() else 'no file'}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata, names = file.metadata() or {}, sorted(file.keys())
                _check_metadata(metadata)
                if names != sorted(_TENSORS):
                    raise CalibrationError(f"tensors: expected {' and '.join(_TENSORS)}, got {_show(', '.join(names) or 'none')}")
                shape = [_whole(metadata, key) for key in ("num_layers", "num_kv_heads", "head_dim")]
                for name in _TENSORS:
                    part = file.get_slice(name)
                    if part.get_dtype() != "F32" or part.get_shape() != shape:
                        raise CalibrationError(f"{name}: expected F32 {shape}, got {part.get_dtype()} {part.get_shape()}")
                k_center, v_center = (file.get_tensor(name).clone() for name in _TENSORS)
        except (SafetensorError, OSError) as error:
            raise CalibrationError(f"expected safetensors, got what cannot be parsed: {_show(str(error))}") from error
        try:
            cache_format = CacheFormat.parse(metadata["format"])
        except FormatError as error:
            raise CalibrationError(str(error)) from error
        calibration = cls(cache_format, metadata["model"], k_center, v_center)
        if calibration.fingerprint() != metadata["fingerprint"]:
            raise CalibrationError(
                f"fingerprint: expected {calibration.fingerprint()}, that of the contents, got {_show(metadata['fingerprint'])}"
            )
        return calibration


def model_id(config: object) -> str:
    """16 hex digits that tell models apart by their configuration.

    It covers the shape of the language model, which engines and versions of Transformers agree upon, and not the weights: a fine-tuned or
    quantized copy has the same identity, except what `sawkv balance` writes. Another model's centers cost accuracy, never correctness.

    Args:
        config: a Transformers configuration, of the text model where there are several.
    """
    names = (
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "sawkv_balanced",
    )
    fields = {name: getattr(config, name, None) for name in names}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _check_metadata(metadata: dict[str, str]) -> None:
    if metadata.get("version") != VERSION:
        raise CalibrationError(
            f"metadata: expected a calibration of version {VERSION}, got {_show(repr(metadata.get('version', 'no version')))}"
        )
    if sorted(metadata) != sorted(_KEYS):
        raise CalibrationError(f"metadata: expected the keys {', '.join(sorted(_KEYS))}, got {_show(', '.join(sorted(metadata)))}")


def _whole(metadata: dict[str, str], key: str) -> int:
    text = metadata[key]
    if not (text.isascii() and text.isdigit() and 1 <= len(text) <= 6 and text[0] != "0"):
        raise CalibrationError(f"{key}: expected a positive integer, got {_show(repr(text))}")
    return int(text)


def _show(text: str) -> str:
    """At most 100 printable characters, for an error message."""
    return "".join(c if c.isprintable() else "?" for c in text[:100])
