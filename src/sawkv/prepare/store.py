"""Calibrations on disk, kept between starts.

An entry is a calibration file. Its key is a digest of everything that it was fitted on, weights included, so two models
never share an entry. The file's fingerprint shows damage: a damaged entry is removed, and the model is prepared again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from sawkv import __version__
from sawkv.errors import CalibrationError
from sawkv.format.spec import CacheFormat
from sawkv.kernels.disk import private_folder
from sawkv.prepare.calibration import VERSION, Calibration, model_id

SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".py")
"""Suffixes of files with weights, and of code that comes with a checkpoint. The engine adds the configuration to the
key itself, because options may have changed it.
"""
SHIPPED: Final = "sawkv"
"""Folder inside a checkpoint with one calibration per format. Engines would load files beside the weights as weights.
"""
PIECE: Final = 64 << 20
"""Bytes of a file that one thread hashes at a time."""

SAMPLES: Final = 64
"""Places of a file of the hub's cache that are read."""
SAMPLE: Final = 4096
"""Bytes of a place."""

logger = logging.getLogger(__name__)


class CalibrationStore:
    """Calibrations in a folder. Several processes may use it at once: entries appear complete, and entries of one key
    are equal.

    Args:
        folder: folder of the entries; None is a private folder in the user's cache.
        log: logger for warnings.

    Raises:
        UnsupportedError: other users could write to the private folder.
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path | None = None, log: logging.Logger = logger) -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._log = private_folder("prepared") if folder is None else folder, log

    def path(self, key: str) -> Path:
        """Path of the entry of a key. The file may not exist."""
        return self._folder / f"{key}.safetensors"

    def load(self, key: str, **expected: Any) -> Calibration | None:
        """The entry of a key, or None.

        Args:
            key: from `make_key`.
            expected: arguments of `Calibration.check`. An entry that is damaged, or was made for something else, is
                removed with a warning, if the folder can be written to.
        """
        path = self.path(key)
        try:
            if not path.exists():
                return None
            calibration = Calibration.load(path)
            calibration.check(**expected)
        except (CalibrationError, OSError) as error:
            self._log.warning(
                "sawkv: what is on disk of an earlier preparation cannot be used and is made again: %s", error
            )
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        return calibration

    def load_all(self, entries: Mapping[str, Mapping[str, Any]]) -> list[Calibration]:
        """The entries of a model whose layers differ in shape, or none if one is missing.

        Args:
            entries: what `load` expects, by key.
        """
        found = [self.load(key, **expected) for key, expected in entries.items()]
        calibrations = [calibration for calibration in found if calibration is not None]
        return calibrations if len(calibrations) == len(found) else []

    def save(self, key: str, calibration: Calibration) -> Path:
        """Write an entry.

        Raises:
            SawkvError: it cannot be written.
        """
        path = self.path(key)
        calibration.save(path)
        return path


def shipped_paths(checkpoint: Path, expected: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Paths of a checkpoint's own calibrations for a format, where engines look for them: one for each shape of layers.

    Args:
        checkpoint: its folder.
        expected: of these shapes, as `expectations` gives it.
    """
    name = "{cache_format}" if len(expected) == 1 else "{cache_format}-{num_kv_heads}x{head_dim}"
    return [checkpoint / SHIPPED / f"{name.format(**each)}.safetensors" for each in expected]


def load_shipped(
    checkpoint: Path, weights: str, expected: Sequence[Mapping[str, Any]], *, log: logging.Logger = logger
) -> list[Calibration]:
    """The calibrations that a checkpoint brings for a format, one for each shape of layers; none where one is missing
    or not for these very weights, which `log` says.

    Args:
        checkpoint: its folder. Nothing in it is changed.
        weights: `contents_digest` of that folder.
        expected: of the model's shapes, as `expectations` gives it.
        log: gets a warning of files that are there and cannot be used.
    """
    paths, found = shipped_paths(checkpoint, expected), []
    if not any(path.exists() for path in paths):
        return []
    for path, each in zip(paths, expected, strict=True):
        try:
            calibration = Calibration.load(path)
            calibration.check(**each)
            if calibration.weights != weights:
                got = f"{calibration.weights[:16]}..." if calibration.weights else "none named"
                raise CalibrationError(f"weights: expected {weights[:16]}..., those of the checkpoint, got {got}")
        except CalibrationError as error:
            log.warning(
                "sawkv: %s, which came with the model, cannot be used, and the model is prepared anew: %s", path, error
            )
            return []
        found.append(calibration)
    return found


def expectations(cache_format: CacheFormat, config: Any, shapes: Iterable[tuple[int, int]]) -> list[dict[str, Any]]:
    """Arguments of `Calibration.check`, one for each shape of a model's layers.

    Args:
        cache_format: with or without its rotation orders.
        config: the decoder's, as of Transformers.
        shapes: KV heads and head_dim.
    """
    return [
        {
            "cache_format": cache_format.resolve(head_dim),
            "model": model_id(config),
            "num_layers": config.num_hidden_layers,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
        }
        for num_kv_heads, head_dim in shapes
    ]


def listed(paths: Iterable[Path]) -> str:
    """Paths of entries, for a log."""
    return " and ".join(map(str, paths))


def make_key(parts: Mapping[str, Any]) -> str:
    """A digest of everything that a calibration was fitted on, and of the versions of sawkv and of the file.

    Args:
        parts: what determined the engine's computation, by name: weights, configuration, dtype, text, device and so on.
            Values that JSON cannot encode count by their `str`.

    Returns:
        32 hex digits.
    """
    whole = {**parts, "sawkv": __version__, "calibration": VERSION}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()[:32]


def contents_digest(folder_or_file: Path) -> str | None:
    """A digest over names and contents of a checkpoint's weights, and of the code that it brings; None if there are no
    weights.

    Files of the Hugging Face hub's cache are named by the SHA-256 of their contents and are not read whole. Samples of
    them count too, because something may have written to them. Times do not count, so that machines agree. A checkpoint
    in the hub's cache and its copy in a folder have different digests.

    Raises:
        OSError: a file cannot be read.
    """
    path = folder_or_file
    files = (
        [path]
        if path.is_file()
        else sorted(file for file in path.glob("*") if file.suffix in SUFFIXES and file.is_file())
    )
    if all(file.suffix == ".py" for file in files):
        return None
    with ThreadPoolExecutor() as pool:
        digests = [f"{file.name}={_file_digest(file, pool.map)}" for file in files]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _file_digest(file: Path, each: Callable[..., Any]) -> str:
    target, status = file.resolve(), file.stat()
    if not status.st_size:
        return "empty"
    if file.is_symlink() and target.parent.name == "blobs" and len(target.name) == 64:
        return f"hub:{target.name}:{status.st_size}:{_sampled(file, status.st_size)}"
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        view = memoryview(content)
        pieces: Sequence[memoryview] = [view[i : i + PIECE] for i in range(0, len(view), PIECE)]
        digests = b"".join(each(_sha256, pieces))
        for piece in (*pieces, view):
            piece.release()
    return hashlib.sha256(digests).hexdigest()


def _sampled(file: Path, size: int) -> str:
    """A digest of places evenly spaced over a file, its start and its end among them."""
    digest, last = hashlib.sha256(), max(0, size - SAMPLE)
    with open(file, "rb") as opened:
        for place in range(SAMPLES):
            opened.seek(last * place // (SAMPLES - 1))
            digest.update(opened.read(SAMPLE))
    return digest.hexdigest()


def _sha256(content: memoryview) -> bytes:
    return hashlib.sha256(content).digest()
