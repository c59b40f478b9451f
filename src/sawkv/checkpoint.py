"""Reads a checkpoint's config.json, and checks that its weight files are complete, without an engine."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sawkv.errors import SawkvError
from sawkv.files import reason

MAX_JSON_BYTES: Final = 100_000_000
"""Larger JSON files and safetensors headers are refused. safetensors has the same limit."""

HUB_TIMEOUT: Final = 5.0
"""Seconds to wait for an answer of the hub."""

_HUB_NAME: Final = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".tensors")
_SIZES: Final = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
_OTHER_HEAD_DIMS: Final = (
    "kv_channels",
    "attention_head_dim",
    "hidden_size_per_head",
    "qk_nope_head_dim",
    "d_kv",
    "head_size",
)
"""Keys of models whose head_dim is not hidden_size / num_attention_heads."""


@dataclass(frozen=True)
class Checkpoint:
    """A model's configuration, and the folder of its weights.

    Attributes:
        name: as the user gave it.
        config: the object in config.json.
        folder: the checkpoint's directory; None if it is only on the hub.
    """

    name: str
    config: dict[str, Any]
    folder: Path | None

    def hub_dtypes(self) -> dict[str, int] | None:
        """Number of elements of all weights by safetensors dtype, as the hub counts them; None if the hub does not
        answer.
        """
        if self.folder is not None:
            return None
        try:
            from huggingface_hub import HfApi

            counted = HfApi().model_info(self.name, timeout=HUB_TIMEOUT).safetensors
        except Exception:  # whatever the HTTP client of this version raises: the caller has another way
            return None
        return None if counted is None else dict(counted.parameters)


def read_checkpoint(model: str) -> Checkpoint | None:
    """The checkpoint in a directory, in the hub's cache, or on the hub. None if it has no config.json and only an
    engine can read it.

    Raises:
        SawkvError: there is no such model, its config.json does not parse, or the hub does not answer.
    """
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            if (path / "config.json").is_file():
                return Checkpoint(model, parse_config(path / "config.json"), path)
            if (path / "params.json").is_file() or any(path.glob("*.gguf")):  # files of Mistral, and of llama.cpp
                return None
            raise SawkvError(f"model: expected a checkpoint directory with a config.json, got {model}, which has none")
        if "://" in model or (path.suffix == ".gguf" and path.exists()):  # vLLM reads these
            return None
        if path.exists():
            raise SawkvError(
                f"model: expected a checkpoint directory, got the file {model}: name the directory that it is in"
            )
    except SawkvError:
        raise
    except (OSError, ValueError) as error:  # the name is too long, or has a null byte
        raise SawkvError(f"model: expected a checkpoint directory, got {model[:200]!r}: {reason(error)}") from error
    if os.environ.get("VLLM_USE_MODELSCOPE", "").lower() in ("1", "true"):
        return None
    return _from_hub(model)


def parse_config(file: Path) -> dict[str, Any]:
    """Parse a config.json.

    Raises:
        SawkvError: it is not a JSON object.
    """
    try:
        if (size := file.stat().st_size) > MAX_JSON_BYTES:
            raise SawkvError(f"{file}: expected at most {MAX_JSON_BYTES} bytes, got {size}")
        content = file.read_bytes()
    except OSError as error:
        raise SawkvError(f"{file}: expected JSON, got what cannot be read: {reason(error)}") from error
    return _parse(content, str(file))


def _parse(content: bytes, name: str) -> dict[str, Any]:
    try:
        config = json.loads(content, object_hook=_number)
    except (ValueError, TypeError, RecursionError) as error:  # not JSON, or not UTF-8
        raise SawkvError(f"expected JSON in {name}, got: {reason(error)}") from error
    if not isinstance(config, dict):
        raise SawkvError(f"expected a JSON object in {name}, got {type(config).__name__}")
    return config


def _number(found: dict[str, Any]) -> Any:
    """JSON has no infinity: Transformers writes {"__float__": "Infinity"} (Mamba 2)."""
    return float(found["__float__"]) if found.keys() == {"__float__"} else found


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration that describes the language model."""
    for name in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(name), dict):
            return text_config(config[name])
    return config


def is_encoder(text: Mapping[str, Any]) -> bool:
    """Whether a language model attends in both directions: Transformers has its `model_type` for masked words, and its
    configuration does not make it a decoder. The key `is_decoder` alone says nothing: GPT-NeoX has it false.
    """
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
    except ImportError:
        return False
    return str(text.get("model_type")) in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not text.get("is_decoder")


def head_dims(config: Mapping[str, Any]) -> list[int]:
    """The head_dims of the language model's attention that config.json gives for certain."""
    text = text_config(config)
    named = [
        text[name] for name in ("head_dim", "global_head_dim") if isinstance(text.get(name), int) and text[name] > 0
    ]
    if named or any(text.get(name) is not None for name in _OTHER_HEAD_DIMS):
        return list(dict.fromkeys(named))
    hidden, heads = text.get("hidden_size"), text.get("num_attention_heads")
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads == 0:
        return [hidden // heads]
    return []


def check_weights(folder: Path) -> None:
    """Refuse safetensors files that are damaged, truncated or missing. Reads only their headers.

    Raises:
        SawkvError: the first such file, by name.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = parse_config(index).get("weight_map")
        names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise SawkvError(
                f"weights: expected {len(names)} files, as {index} says, got {len(names) - len(missing)}: {missing[0]}"
                " is missing. Download the checkpoint again"
            )
    for file in sorted(folder.glob("*.safetensors")):
        _check_safetensors(file)


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a file of weights, of any kind."""
    return any(file.suffix in WEIGHT_SUFFIXES for file in folder.iterdir())


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a file that may be of a tokenizer, by its name."""
    parts = ("token", "vocab", "tekken", "spiece", "sentencepiece", "bpe")
    return any(part in file.name.lower() for file in folder.iterdir() for part in (*parts, ".gguf"))


def wrong_sizes(config: Mapping[str, Any]) -> list[str]:
    """Sizes of a language model that are no positive numbers, in the words of config.json."""
    text = text_config(config)
    return [
        f"{name}: expected a positive whole number in config.json, got {text[name]!r}"
        for name in _SIZES
        if isinstance(text.get(name), (str, float)) or (isinstance(text.get(name), int) and text[name] < 1)
    ]


def _check_safetensors(file: Path) -> None:
    try:
        tensors, start = read_header(file)
        expected = start + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        size = file.stat().st_size
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise damaged(file) from error
    if size != expected:
        raise SawkvError(
            f"weights: expected {expected} bytes, as its header says, got {size} in {file}. Download it again"
        )


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """What the header of a safetensors file says of each tensor, by name, and the number of bytes before the tensors.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has no such header.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > MAX_JSON_BYTES:
            raise ValueError(f"a header of {length} bytes")
        try:
            header = json.loads(stream.read(length))
        except RecursionError as error:
            raise ValueError("a header of many levels") from error
    if not isinstance(header, dict):
        raise ValueError(f"a header that is a {type(header).__name__}")
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}, 8 + length


def damaged(file: Path) -> SawkvError:
    """What to say of a safetensors file whose header cannot be read."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            is_pointer = stream.read(64).startswith(b"version https://git-lfs")
    except OSError as error:
        return SawkvError(f"weights: expected safetensors, got what cannot be read in {file}: {reason(error)}")
    if is_pointer:
        return SawkvError(f"weights: expected safetensors, got a Git LFS pointer in {file}. Run `git lfs pull` there")
    return SawkvError(f"weights: expected safetensors, got {size} bytes that are not, in {file}. Download it again")


def _from_hub(model: str) -> Checkpoint | None:
    wanted = (
        f"model: expected a checkpoint directory or a model of the Hugging Face hub, got {model[:200]!r}: no such"
        " directory"
    )
    if not _HUB_NAME.fullmatch(model):
        raise SawkvError(wanted)
    try:
        from huggingface_hub import hf_hub_url, try_to_load_from_cache
        from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]
    except ImportError as error:
        raise SawkvError(f"{wanted}, and huggingface_hub is not installed") from error
    try:
        cached = try_to_load_from_cache(model, "config.json")
        if isinstance(cached, str):
            return Checkpoint(model, parse_config(Path(cached)), Path(cached).parent)
        # One request: the library's own download tries five times, with warnings.
        url, headers = hf_hub_url(model, "config.json"), build_hf_headers()
        answer = get_session().get(url, headers=headers, timeout=HUB_TIMEOUT, follow_redirects=True)
    except SawkvError:
        raise
    except Exception as error:  # whatever the HTTP client of this version raises
        raise SawkvError(
            f"{wanted}, it is not in the hub's cache, and the hub cannot be asked ({type(error).__name__})"
        ) from error
    if answer.status_code in (401, 403):
        raise SawkvError(f"{wanted}, and the hub wants a login that may see such a model (`hf auth login`)")
    if answer.status_code == 404 and answer.headers.get("X-Error-Code") == "EntryNotFound":
        return None  # the model may have files of Mistral's kind only
    if answer.status_code != 200:
        raise SawkvError(f"{wanted}, and the hub has no config.json of it (status {answer.status_code})")
    return Checkpoint(model, _parse(answer.content, f"config.json of {model}"), None)
