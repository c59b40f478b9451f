"""Files that commands write. A path is checked before the work, and a file appears at its path only when it is
complete.
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
    """Make the folder of `path` if it does not exist, and try to write there.

    Raises:
        SawkvError: `path` is a folder, or the folder is not writable.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        with contextlib.suppress(FileNotFoundError):
            path.stat()  # fails for a name that is too long, or a path through a file
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
    """A temporary path beside `path`. When the block ends it replaces `path`; if the block fails it is removed.

    A device such as /dev/stdout is written to directly, so the block has to write into the path that it gets, and not
    to replace it.

    Raises:
        SawkvError: the path is not writable.
    """
    part = None
    try:
        if _is_device(path):
            yield path
            return
        target = path.resolve()  # of a link
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{secrets.token_hex(8)}.part")  # two containers may have equal process ids
        part.touch()
        yield part
        part.replace(target)
    except OSError as error:
        raise SawkvError(f"cannot write {path}: {reason(error)}") from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def reason(error: Exception) -> str:
    """The cause of an OSError in one line, without its number and path."""
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _is_device(path: Path) -> bool:
    """Whether the path is a device, such as /dev/stdout."""
    return path.exists() and not path.is_file() and not path.is_dir()
