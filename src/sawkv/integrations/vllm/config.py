"""The user's settings: vLLM's `--kv-cache-dtype`, and the `sawkv` entry of its `--additional-config`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from sawkv.errors import FormatError, UnsupportedError
from sawkv.format.spec import CacheFormat
from sawkv.integrations.vllm.contract import TAKES_NAMES, installed_release
from sawkv.prepare.calibration import Calibration

if TYPE_CHECKING:
    from vllm.config import VllmConfig

VLLM_DTYPE_CODECS: Final = {"int4_per_token_head": "int4", "int8_per_token_head": "int8"}
"""vLLM's names that sawkv takes over. vLLM before 0.33 accepts no new names, and sizes pages for these as our formats
need. Formats below 4 bits have the name of INT4, and tell vLLM the size of their pages (`refusals.of_format`).
"""
OWN_DTYPE_CODECS: Final = {"sawkv_int4": "int4", "sawkv_int8": "int8"}
"""Names that nobody but sawkv serves. `dtypes` registers them in vLLM from 0.33 on."""
KV_CACHE_DTYPE_CODECS: Final = VLLM_DTYPE_CODECS | OWN_DTYPE_CODECS
"""All names of `--kv-cache-dtype` under which pages are sawkv's."""

WORKER_EXTENSION: Final = "sawkv.integrations.vllm.worker.Extension"
"""For vLLM's `--worker-extension-cls`, so that no worker runs without sawkv."""
_KEYS: Final = ("format", "calibration", "prepare", "prepare_cache")
_FLOAT_DTYPE_CODECS: Final = {"bfloat16": "bf16", "float16": "fp16"}
FLOAT_CODECS: Final[dict[object, str]] = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class SawConfig:
    """Settings of the plugin, from `--additional-config '{"sawkv": {...}}'`.

    Attributes:
        format: the cache format. By default that of the calibration, or int4 or int8 as `--kv-cache-dtype` says.
        calibration: the calibration in the file of the key `calibration`, or None.
        prepare: the key `prepare`: whether the model is prepared when it is loaded.
        prepare_cache: the key `prepare_cache`: folder for calibrations between starts; None is one in the user's cache.
    """

    format: CacheFormat
    calibration: Calibration | None = None
    prepare: bool = True
    prepare_cache: Path | None = None

    @property
    def prepares(self) -> bool:
        """Whether the engine prepares the model. Not with a calibration file, nor in formats of 8 bits and more."""
        return self.prepare and self.calibration is None and self.format.feeds_back

    @classmethod
    def from_vllm(cls, vllm_config: VllmConfig, kv_cache_dtype: str) -> SawConfig | None:
        """The settings for a layer of `kv_cache_dtype`, or None where its cache is not ours.

        The `sawkv` entry is of the target model: a draft's layers are ours if their dtype is one of our two, with the
        default format of their head_dim, no calibration and no preparation. A layer is not ours if vLLM gave it another
        dtype than the user (`--kv-cache-dtype-skip-layers`).

        Raises:
            UnsupportedError: the settings contradict vLLM's.
            FormatError: the format's name is not valid.
            CalibrationError: the calibration file cannot be used.
        """
        draft = is_draft(vllm_config)
        options = {} if draft else _options(vllm_config)
        codec = KV_CACHE_DTYPE_CODECS.get(kv_cache_dtype)
        if codec is None:
            if draft or not has_entry(vllm_config) or kv_cache_dtype != vllm_config.cache_config.cache_dtype:
                return None
            if not {"format", "calibration"} & set(options):
                raise UnsupportedError(
                    f"sawkv entry of --additional-config: expected --kv-cache-dtype {dtype_for('int4')} or"
                    f" {dtype_for('int8')} beside it, or the key format in it, got"
                    f" {kv_cache_dtype}{_asked_by_checkpoint(vllm_config, kv_cache_dtype)}"
                )
        path = options.get("calibration")
        if path is not None and not isinstance(path, str):
            raise UnsupportedError(
                f"sawkv calibration: expected the path of a file that `sawkv prepare` wrote, got {path!r}"
            )
        prepare = options.get("prepare", not draft)
        if not isinstance(prepare, bool):
            raise UnsupportedError(f"sawkv prepare: expected true or false, got {prepare!r}")
        folder = options.get("prepare_cache")
        if folder is not None and not isinstance(folder, str):
            raise UnsupportedError(f"sawkv prepare_cache: expected the path of a folder, got {folder!r}")
        calibration = None if path is None else _load(path)
        name = options.get("format", codec if calibration is None else str(calibration.format))
        if not isinstance(name, str):
            raise FormatError(f"sawkv format: expected a name such as int4-k128-v128, got {name!r}")
        cache_format = CacheFormat.parse(name)
        if dtype_codec(cache_format) != (codec or _float_codec(vllm_config, kv_cache_dtype)):
            dtypes = {codec: dtype for dtype, codec in _FLOAT_DTYPE_CODECS.items()}
            wanted = dtype_for(dtype_codec(cache_format)) or dtypes.get(
                cache_format.codec, f"auto and a model dtype of {cache_format.codec}"
            )
            raise UnsupportedError(
                f"sawkv format {cache_format} needs pages of its own size: expected --kv-cache-dtype {wanted}, "
                f"got {kv_cache_dtype}{_asked_by_checkpoint(vllm_config, kv_cache_dtype)}"
            )
        return cls(cache_format, calibration, prepare, None if folder is None else Path(folder))


def dtype_codec(cache_format: CacheFormat) -> str:
    """The codec whose name of `--kv-cache-dtype` a format has: INT4's for all that need preparation."""
    return "int4" if cache_format.feeds_back else cache_format.codec


def dtype_for(codec: str) -> str | None:
    """The name of `--kv-cache-dtype` for pages of a codec: our own where the installed vLLM takes it. None for formats
    that do not quantize.
    """
    names = OWN_DTYPE_CODECS if installed_release() >= TAKES_NAMES else VLLM_DTYPE_CODECS
    return next((name for name, of_name in names.items() if of_name == codec), None)


def engine_options(
    cache_format: CacheFormat,
    calibration: str | Path | None = None,
    prepare: bool = True,
    prepare_cache: str | Path | None = None,
) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, or of its server with dashes, that store KV caches in `cache_format`. Others as in
    `SawConfig`.
    """
    settings: dict[str, Any] = {"format": str(cache_format)}
    if calibration is not None:
        settings["calibration"] = str(Path(calibration).resolve())
    if not prepare:
        settings["prepare"] = False
    if prepare_cache is not None:
        settings["prepare_cache"] = str(Path(prepare_cache).resolve())
    options: dict[str, Any] = {
        "kv_cache_dtype": dtype_for(dtype_codec(cache_format)) or "auto",
        "additional_config": {"sawkv": settings},
        "worker_extension_cls": WORKER_EXTENSION,
    }
    # Not is_available(): it may start CUDA in this process, and vLLM could not fork. On the CPU vLLM has one backend,
    # which sawkv replaces.
    if torch.cuda.device_count():
        options["attention_backend"] = "CUSTOM"
    return options


def is_draft(vllm_config: Any) -> bool:
    """Whether vLLM is making layers of a draft model. vLLM tags them; the current configuration may be the target's."""
    tag = getattr(sys.modules.get("vllm.compilation.backends"), "model_tag", "")
    return vllm_config.speculative_config is not None and (tag == "draft_model" or tag.endswith("_head"))


def has_entry(vllm_config: VllmConfig) -> bool:
    """Whether `--additional-config` has a `sawkv` entry."""
    return isinstance(vllm_config.additional_config, dict) and "sawkv" in vllm_config.additional_config


def _asked_by_checkpoint(vllm_config: VllmConfig, kv_cache_dtype: str) -> str:
    """A note for messages: without an option, vLLM takes the dtype from the checkpoint."""
    asked = asks_for_a_cache(getattr(vllm_config.model_config.hf_config, "quantization_config", None))
    return ", which the checkpoint's quantization_config asks for" if asked and kv_cache_dtype != "auto" else ""


def asks_for_a_cache(quantization: object) -> bool:
    """Whether a checkpoint's `quantization_config` names a dtype of the KV cache."""
    return isinstance(quantization, dict) and any(
        part.get(key)
        for part in (quantization, quantization.get("quantization"))
        if isinstance(part, dict)
        for key in ("kv_cache_scheme", "kv_cache_quant_algo")
    )


@cache  # every layer asks
def _load(path: str) -> Calibration:
    return Calibration.load(path)


def _options(vllm_config: VllmConfig) -> Mapping[str, Any]:
    additional = vllm_config.additional_config
    options = additional.get("sawkv", {}) if isinstance(additional, dict) else {}
    unknown = set(options) - set(_KEYS) if isinstance(options, dict) else {repr(options)}
    if unknown:
        raise UnsupportedError(
            f"sawkv entry of --additional-config: expected an object with the keys {', '.join(_KEYS)}, got"
            f" {', '.join(sorted(unknown))}"
        )
    return options


def _float_codec(vllm_config: VllmConfig, kv_cache_dtype: str) -> str | None:
    if kv_cache_dtype == "auto":
        return FLOAT_CODECS.get(vllm_config.model_config.dtype)
    return _FLOAT_DTYPE_CODECS.get(kv_cache_dtype)
