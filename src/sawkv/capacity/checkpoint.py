"""Where a model's config.json and weights are: in a directory or on the Hugging Face hub. None of its code is run."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sawkv.errors import SawkvError, UnsupportedError

HUB_TIMEOUT: Final = 5.0
"""Seconds to wait for the hub, asked once: a plan needs two small answers."""

_HUB_NAME: Final = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class Checkpoint:
    """A model's config, and where its weights can be measured.

    Attributes:
        name: as the user gave it.
        config: the object in config.json.
        folder: the directory of its files, None where only the hub has them.
    """

    name: str
    config: dict[str, Any]
    folder: Path | None

    def hub_dtypes(self) -> dict[str, int] | None:
        """Elements of all weights by safetensors dtype, as the hub counts them; None where it cannot be asked."""
        if self.folder is not None:
            return None
        try:
            from huggingface_hub import HfApi

            counted = HfApi().model_info(self.name, timeout=HUB_TIMEOUT).safetensors
        except Exception:  # whatever the HTTP client of this version raises: the caller has another way
            return None
        return None if counted is None else dict(counted.parameters)


def read_checkpoint(model: str) -> Checkpoint:
    """The checkpoint in a directory, in the hub's cache, or on the hub.

    Raises:
        SawkvError: there is no such model, or its config.json is not a JSON object.
        UnsupportedError: it can only be on the hub, which cannot be asked.
    """
    path = Path(model)
    if path.is_dir():
        file = path / "config.json"
        if not file.is_file():
            raise SawkvError(f"plan: expected a config.json in {model}, got none")
        return Checkpoint(model, _parse(file.read_bytes(), str(file)), path)
    if path.exists():
        raise SawkvError(f"plan: expected a checkpoint directory, got the file {model}: name the directory that it is in")
    if not _HUB_NAME.fullmatch(model):
        raise SawkvError(f"{_wanted(model)} no such directory")
    return _from_hub(model)


def _from_hub(model: str) -> Checkpoint:
    wanted = f"{_wanted(model)} no such directory, and"
    try:
        from huggingface_hub import hf_hub_url, try_to_load_from_cache
        from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]
    except ImportError as error:
        raise UnsupportedError(f"{wanted} huggingface_hub is not installed") from error
    try:
        cached = try_to_load_from_cache(model, "config.json")
        if isinstance(cached, str):
            return Checkpoint(model, _parse(Path(cached).read_bytes(), cached), Path(cached).parent)
        # One plain request: the library's own download tries five times, with warnings.
        url, headers = hf_hub_url(model, "config.json"), build_hf_headers()
        answer = get_session().get(url, headers=headers, timeout=HUB_TIMEOUT, follow_redirects=True)
    except SawkvError:
        raise
    except Exception as error:  # whatever the HTTP client of this version raises
        raise UnsupportedError(f"{wanted} the hub cannot be asked ({type(error).__name__})") from error
    if answer.status_code in (401, 403):
        raise UnsupportedError(f"{wanted} the hub wants a login that may see such a model (`hf auth login`)")
    if answer.status_code != 200:
        raise SawkvError(f"{wanted} the hub has no config.json of it (status {answer.status_code})")
    return Checkpoint(model, _parse(answer.content, f"config.json of {model}"), None)


def _wanted(model: str) -> str:
    return f"plan: expected a checkpoint directory or a model of the Hugging Face hub, got {model!r}:"


def _parse(content: bytes, name: str) -> dict[str, Any]:
    try:
        config = json.loads(content)
    except ValueError as error:  # not JSON, or not UTF-8
        raise SawkvError(f"plan: expected JSON in {name}, got: {error}") from error
    if not isinstance(config, dict):
        raise SawkvError(f"plan: expected a JSON object in {name}, got {type(config).__name__}")
    return config
