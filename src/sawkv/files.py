"""Files that commands write: asked for before the work, written beside their place, and put there when
they are whole.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sawkv.errors import SawkvError


def check_writable(path: Path) -> None:
    """Make the folder of `path` if there is none, and try to write there.

    Raises:
        SawkvError: `path` is a folder, or nothing can be written there.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        with contextlib.suppress(FileNotFoundError):
            path.stat()  # names that are too long, or go on below a file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "it is write-protected")
        if not _is_device(path):
            with tempfile.TemporaryFile(dir=path.resolve().parent) as probe:
                probe.write(b"0")
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise SawkvError(f"--out: expected a file that can be written, got {path}: {reason(error)}") from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A path to write to, beside `path`. It takes the place of `path` when the block ends, and is removed if the block
    fails.

    What is left has the permissions of any new file, whatever wrote it. A device is written to as it is.

    Raises:
        SawkvError: it cannot be written.
    """
    part = None
    try:
        if _is_device(path):
            yield path
            return
        target = path.resolve()  # of a link
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{secrets.token_hex(8)}.part")  # two containers may have one process number
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # safetensors makes files that only their owner can read
        part.replace(target)
    except OSError as error:
        raise SawkvError(f"cannot write {path}: {reason(error)}") from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def reason(error: Exception) -> str:
    """What went wrong in one line, without the number and the path."""
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _is_device(path: Path) -> bool:
    """Such as /dev/stdout."""
    return path.exists() and not path.is_file() and not path.is_dir()
