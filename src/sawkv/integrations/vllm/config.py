"""What the user asked for: vLLM's `--kv-cache-dtype` and the `sawkv` entry of its `--additional-config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import torch

from sawkv.errors import FormatError, UnsupportedError
from sawkv.format.spec import CacheFormat
from sawkv.prepare.calibration import Calibration

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KV_CACHE_DTYPE_CODECS: Final = {"int4_per_token_head": "int4", "int8_per_token_head": "int8"}
"""The names of vLLM that sawkv takes over, since vLLM before 0.33 accepts no new ones. They size pages as our formats do."""

_FLOAT_DTYPE_CODECS: Final = {"bfloat16": "bf16", "float16": "fp16"}
_FLOAT_CODECS: Final[dict[object, str]] = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class SawConfig:
    """The plugin's settings, from `--additional-config '{"sawkv": {...}}'`.

    Attributes:
        format: the cache format; without one, that of the calibration, or the default of int4 or int8 as `--kv-cache-dtype` says.
        calibration: centers and feedback of K and V, from the file that the key `calibration` names, or None.
    """

    format: CacheFormat
    calibration: Calibration | None = None

    @classmethod
    def from_vllm(cls, vllm_config: VllmConfig, kv_cache_dtype: str) -> SawConfig | None:
        """The settings for layers of `kv_cache_dtype`, or None where the cache is not ours.

        Raises:
            UnsupportedError: the settings contradict vLLM's.
            FormatError: the format's name is not valid.
            CalibrationError: the calibration file cannot be used.
        """
        options = _options(vllm_config)
        codec = KV_CACHE_DTYPE_CODECS.get(kv_cache_dtype)
        if codec is None and not options:
            return None
        path = options.get("calibration")
        if path is not None and not isinstance(path, str):
            raise UnsupportedError(f"sawkv calibration: expected the path of a file that `sawkv calibrate` wrote, got {path!r}")
        calibration = None if path is None else _load(path)
        name = options.get("format", codec if calibration is None else str(calibration.format))
        if not isinstance(name, str):
            raise FormatError(f"sawkv format: expected a name such as int4-k128-v128, got {name!r}")
        cache_format = CacheFormat.parse(name)
        if cache_format.codec != (codec or _float_codec(vllm_config, kv_cache_dtype)):
            dtypes = {c: dtype for dtype, c in (KV_CACHE_DTYPE_CODECS | _FLOAT_DTYPE_CODECS).items()}
            wanted = dtypes.get(cache_format.codec, f"auto and a model dtype of {cache_format.codec}")
            raise UnsupportedError(
                f"sawkv format {cache_format} needs pages of its own size: expected --kv-cache-dtype {wanted}, got {kv_cache_dtype}"
            )
        return cls(cache_format, calibration)


@cache  # every layer asks
def _load(path: str) -> Calibration:
    return Calibration.load(path)


def _options(vllm_config: VllmConfig) -> Mapping[str, Any]:
    additional = vllm_config.additional_config
    options = additional.get("sawkv", {}) if isinstance(additional, dict) else {}
    unknown = set(options) - {"format", "calibration"} if isinstance(options, dict) else {repr(options)}
    if unknown:
        raise UnsupportedError(
            f"sawkv entry of --additional-config: expected an object with the keys format and calibration, got {', '.join(sorted(unknown))}"
        )
    return options


def _float_codec(vllm_config: VllmConfig, kv_cache_dtype: str) -> str | None:
    if kv_cache_dtype == "auto":
        return _FLOAT_CODECS.get(vllm_config.model_config.dtype)
    return _FLOAT_DTYPE_CODECS.get(kv_cache_dtype)
