"""Reads vLLM's command line as vLLM does. Imports no vLLM."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from sawkv.errors import SawkvError
from sawkv.files import reason

_SHORT: Final = {
    "-ac": "--attention-config",
    "-dcp": "--decode-context-parallel-size",
    "-pcp": "--prefill-context-parallel-size",
    "-sc": "--speculative-config",
    "-tp": "--tensor-parallel-size",
}
_SPECULATIVE: Final = {"--spec-method": "method", "--spec-model": "model"}
_WHOLE: Final = ("--tokenizer", "--kv-cache-dtype")
"""Options of vLLM that are prefixes of other options which are read here."""


class Options:
    """vLLM's command line, as far as these checks read it. Options may have dashes or underscores, a value after a
    space or `=`, and may be abbreviated, as in argparse.

    Args:
        arguments: the words.

    Raises:
        SawkvError: `--config` names a file that cannot be read.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._given = list(_pairs(arguments))
        if "--config" in arguments:  # vLLM reads no other form, and prefers what is given last
            file = next(iter(arguments[arguments.index("--config") + 1 :]), None)
            if file is None:
                raise SawkvError("--config: expected a YAML file of options, got nothing")
            self._given = [*_pairs(_words_of(file)), *self._given]

    def get(self, name: str) -> str | None:
        """The value given last, or None."""
        return next((value for option, key, value in reversed(self._given) if not key and _names(option, name)), None)

    def has(self, name: str) -> bool:
        """Whether the option is given, whole or as `--name.key`."""
        return any(_names(option, name) for option, _, _ in self._given)

    def whole(self, name: str, default: int) -> int:
        """A value that is a whole number, such as 8192 or 8k. `default` if it is not given, or if
        vLLM will refuse it.
        """
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)", self.get(name) or "", re.ASCII | re.IGNORECASE)
        if found is None or ("." in found[1] and not found[2].islower()):
            return default
        power = "kmgt".index(found[2].lower()) + 1 if found[2] else 0
        return int(float(found[1]) * (1024 if found[2].isupper() else 1000) ** power)

    def json(self, name: str) -> dict[str, Any]:
        """A value that is a JSON object, or the object that `--name.key value` options make, which vLLM prefers.

        Raises:
            SawkvError: it is no JSON object.
        """
        if (start := self.start_of_keys(name)) is not None:
            return _nested([(key, value) for option, key, value in self._given if key and option == start])
        text = self.get(name)
        try:
            value = {} if text is None else json.loads(text)
        except ValueError:
            value = text
        if not isinstance(value, dict):
            raise SawkvError(f"{name}: expected a JSON object, got {text!r}")
        return value

    def start_of_keys(self, name: str) -> str | None:
        """The spelling in which `name` was given as `--name.key`. vLLM merges options of one spelling, and prefers the
        spelling that appeared last.
        """
        starts = dict.fromkeys(option for option, key, _ in self._given if key and _names(option, name))
        return next(reversed(starts), None)

    def speculative(self) -> dict[str, Any]:
        """`--speculative-config`, with keys that have options of their own. Errors as in `json`."""
        given = {key: self.get(option) for option, key in _SPECULATIVE.items()}
        return self.json("--speculative-config") | {key: value for key, value in given.items() if value is not None}


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str, str | None]]:
    """Each option as typed, the key below it or "", and its value."""
    for i, argument in enumerate(arguments):
        if not argument.startswith("-"):
            continue
        name, equals, value = argument.partition("=")
        option, _, key = name.partition(".")
        following = arguments[i + 1] if i + 1 < len(arguments) else None
        yield option.replace("_", "-"), key, value if equals else following


def _nested(given: Sequence[tuple[str, str | None]]) -> dict[str, Any]:
    """The object that `--name.key value` and `--name.outer.key value` make. Values are JSON, or else text."""
    found: dict[str, Any] = {}
    for path, text in given:
        *outer, key = path.replace("-", "_").split(".")
        place = found
        for part in outer:
            if not isinstance(place.get(part), dict):
                place[part] = {}
            place = place[part]
        try:
            place[key] = None if text is None else json.loads(text)
        except ValueError:
            place[key] = text
    return found


def _names(option: str, name: str) -> bool:
    """Whether the typed `option` means `name`, perhaps abbreviated. vLLM refuses ambiguous abbreviations."""
    option = _SHORT.get(option, option)
    return option == name or (len(option) > len("--") and option not in _WHOLE and name.startswith(option))


def _words_of(file: str) -> list[str]:
    """Options in a YAML file of `--config`, as words of a command line."""
    import yaml

    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SawkvError(f"--config: expected a YAML file of options, got {file}: {reason(error)}") from error
    if not isinstance(content, dict):
        raise SawkvError(f"--config: expected options with their values, got {type(content).__name__} in {file}")
    return [
        f"--{name}={value if isinstance(value, str) else json.dumps(value, default=str)}"
        for name, value in content.items()
        if value is not False  # as if it were not there
    ]
