"""What a checkpoint's small files say, read without an engine: config.json, and whether its weights are whole."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from sawkv.errors import SawkvError
from sawkv.files import reason

MAX_JSON_BYTES: Final = 100 << 20
"""More than any config.json, and than any header of safetensors, which that library limits to this."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
_OTHER_HEAD_DIMS: Final = ("kv_channels", "attention_head_dim", "hidden_size_per_head", "qk_nope_head_dim", "d_kv", "head_size")
"""Keys of models whose head_dim is not hidden_size / num_attention_heads."""


def read_config(model: str) -> dict[str, Any] | None:
    """The config.json of a checkpoint directory or of a model on the Hugging Face hub; None where an engine may find what is not seen here.

    Raises:
        SawkvError: there is no such model, or its config.json does not parse.
    """
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            if (path / "config.json").is_file():
                return parse_config(path / "config.json")
            if (path / "params.json").is_file() or any(path.glob("*.gguf")):  # Mistral's own files, and llama.cpp's
                return None
            raise SawkvError(f"model: expected a checkpoint directory with a config.json, got {model}, which has none")
        if path.exists() or "://" in model:  # a GGUF file, or a store that vLLM reads
            return None
    except (OSError, ValueError) as error:  # too long a name, a null byte
        raise SawkvError(f"model: expected a checkpoint directory, got {model[:200]!r}: {reason(error)}") from error
    if os.environ.get("VLLM_USE_MODELSCOPE", "").lower() in ("1", "true"):
        return None
    return _from_hub(model)


def parse_config(file: Path) -> dict[str, Any]:
    """A config.json.

    Raises:
        SawkvError: it is not a JSON object.
    """
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise SawkvError(f"{file}: expected at most {MAX_JSON_BYTES} bytes, got {file.stat().st_size}")
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SawkvError(f"{file}: expected JSON, got what cannot be read: {reason(error)}") from error
    if not isinstance(config, dict):
        raise SawkvError(f"{file}: expected a JSON object, got {type(config).__name__}")
    return config


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that describes the language model."""
    for name in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(name), dict):
            return text_config(config[name])
    return config


def head_dims(config: Mapping[str, Any]) -> list[int]:
    """The head_dims that a language model's attention has, as far as config.json says them for certain."""
    text = text_config(config)
    named = [text[name] for name in ("head_dim", "global_head_dim") if isinstance(text.get(name), int) and text[name] > 0]
    if named or any(text.get(name) is not None for name in _OTHER_HEAD_DIMS):
        return list(dict.fromkeys(named))
    hidden, heads = text.get("hidden_size"), text.get("num_attention_heads")
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads == 0:
        return [hidden // heads]
    return []


def check_weights(folder: Path) -> None:
    """Refuse safetensors files that are damaged, cut off, or missing from those that the index names. Reads headers alone.

    Raises:
        SawkvError: the first such file, by name.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = parse_config(index).get("weight_map")
        names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
        missing = [name for name in names if not (folder / str(name)).is_file()]
        if missing:
            raise SawkvError(
                f"weights: expected {len(names)} files, as {index} says, got {len(names) - len(missing)}: {missing[0]} is missing. "
                "Download the checkpoint again"
            )
    for file in sorted(folder.glob("*.safetensors")):
        _check_safetensors(file)


def _check_safetensors(file: Path) -> None:
    size = 0
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            (length,) = struct.unpack("<Q", start)
            if length > MAX_JSON_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error, RecursionError) as error:
        if size < 1024 and start_of_lfs_pointer(file):
            raise SawkvError(f"weights: expected safetensors, got a Git LFS pointer in {file}. Run `git lfs pull` there") from error
        raise SawkvError(f"weights: expected safetensors, got {size} bytes that are not, in {file}. Download it again") from error
    if size != expected:
        raise SawkvError(f"weights: expected {expected} bytes, as its header says, got {size} in {file}. Download it again")


def start_of_lfs_pointer(file: Path) -> bool:
    """Whether a file is what Git leaves where large files were not fetched."""
    try:
        with file.open("rb") as stream:
            return stream.read(64).startswith(b"version https://git-lfs")
    except OSError:
        return False


def _from_hub(model: str) -> dict[str, Any] | None:
    if not _HUB_NAME.fullmatch(model):
        raise SawkvError(
            f"model: expected a checkpoint directory or a name on the Hugging Face hub, got {model[:200]!r}: no such directory"
        )
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError
    except ImportError:  # vLLM brings it
        return None
    cached = try_to_load_from_cache(model, "config.json")
    if isinstance(cached, str):
        return parse_config(Path(cached))
    problem: object
    try:
        get_hf_file_metadata(hf_hub_url(model, "config.json"), timeout=10)
        return parse_config(Path(hf_hub_download(model, "config.json")))
    except GatedRepoError:
        problem = "it is gated: ask for access on its page, then `hf auth login`"
    except EntryNotFoundError:
        return None  # perhaps Mistral's own files
    except RepositoryNotFoundError:
        problem = "there is no such directory here, and no such model on the hub (or it is private)"
    except Exception as error:  # no network, by whatever library the hub's client uses
        problem = f"there is no such directory here, it is not in the hub's cache, and the hub does not answer ({reason(error)[:200]})"
    raise SawkvError(f"model: expected a checkpoint directory or a model of the Hugging Face hub, got {model!r}: {problem}")
