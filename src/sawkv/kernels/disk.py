"""The disk cache of compiled kernels. Code is loaded from it, so other users must not be able to write to it."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from sawkv.errors import UnsupportedError

DIGEST_BYTES = hashlib.sha256().digest_size


def private_folder(name: str) -> Path:
    """Make the folder `$XDG_CACHE_HOME/sawkv/<name>`, or `~/.cache/sawkv/<name>`, if it does not exist.

    Raises:
        UnsupportedError: another user owns the folder or its parent, or could write to one of them.
        OSError: the folder cannot be made.
    """
    parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sawkv"
    folder = parent / name
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    for path in (parent, folder):
        check_private(path)
    return folder


def check_private(folder: Path) -> None:
    """Refuse a folder that other users could write to.

    Raises:
        UnsupportedError: another user owns the folder, or could write to it.
    """
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnsupportedError(f"cache folder {folder}: expected one that this user owns and no other can write to")


def digest(content: bytes) -> bytes:
    """SHA-256 of a file's content, which shows whether a stored file is damaged."""
    return hashlib.sha256(content).digest()
