"""vLLM's file tier, with blocks that are bound to what they were written with, and damage that is a miss.

Blocks lie in `<root_dir>/<fingerprint>` (`offload`), which only this user can read and write: pages tell what a prompt
says. `sawkv.json` there says what the fingerprint is of. vLLM notices a file that is too short, and no other damage
(0.26 to 0.32). This tier writes `<block>.sum` before the block, so that no block is seen without, and compares after
each load. A block that differs is removed, its job fails, and vLLM computes the tokens again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from vllm.logger import init_logger
from vllm.v1.kv_offload.base import LookupResult
from vllm.v1.kv_offload.tiering.base import JobResult
from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager

from sawkv.errors import SawkvError, UnsupportedError
from sawkv.files import reason, writing
from sawkv.integrations.vllm.offload import differences, fingerprint
from sawkv.kernels.disk import check_private

NAME_LENGTH: Final = 32
"""Hex digits of the fingerprint in the folder's name."""
MANIFEST: Final = "sawkv.json"
SAID: Final = 4
"""Differences that a message names."""

logger = init_logger(f"vllm.{__name__}")

Blocks = Sequence[tuple[str, memoryview]]
"""Path and bytes in host memory, of each block of a job."""


class CheckedFileTier(FileSystemTierManager):
    """`{"type": "sawkv_fs", "root_dir": ...}` in `secondary_tiers`. Options are those of vLLM's `fs`.

    Args:
        args: of vLLM's tier.
        written_with: from `offload.bind`.
        kwargs: of vLLM's tier. `root_dir` may be shared by engines of any format and calibration.

    Raises:
        UnsupportedError: the engine has no sawkv, or others could write to the folder of its blocks.
    """

    _pool: Any

    def __init__(self, *args: Any, written_with: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if written_with is None:
            raise UnsupportedError("secondary tier of type sawkv_fs: expected an engine with sawkv, see the log above")
        self._key = fingerprint(written_with)
        kwargs["root_dir"] = str(open_folder(Path(kwargs["root_dir"]), self._key, written_with))
        super().__init__(*args, **kwargs)
        if hasattr(JobResult, "successful_keys") and not hasattr(self, "_load_progress"):
            raise UnsupportedError("sawkv does not fit this vLLM: it needs FileSystemTierManager._load_progress")
        # Of a load that failed, vLLM from 0.28 on keeps this many blocks from the first on; earlier ones keep none.
        self._kept: dict[Any, int] = getattr(self, "_load_progress", {})
        self._pool = _Pool(self._pool)
        self._flat = self._primary_kv_view.cast("B")
        self._lost: set[str] = set()

    def lookup(self, key: Any, req_context: Any) -> Any:
        """As in vLLM, but never a hit on a block that was found damaged: vLLM remembers what it looked up."""
        if self._lost and self.file_mapper.get_file_name(key) in self._lost:
            return LookupResult.MISS
        return super().lookup(key, req_context)

    def submit_store(self, job_metadata: Any) -> None:
        blocks = self._blocks(job_metadata)
        self._lost.difference_update(path for path, _ in blocks)
        with self._pool.around_each(functools.partial(self._write, blocks)):
            super().submit_store(job_metadata)

    def submit_load(self, job_metadata: Any) -> None:
        blocks = self._blocks(job_metadata)
        with self._pool.around_each(functools.partial(self._read, job_metadata.job_id, blocks)):
            super().submit_load(job_metadata)

    def shutdown(self) -> None:
        super().shutdown()
        self._flat.release()

    def _write(self, blocks: Blocks, write: Callable[[], None]) -> None:
        write_sums(missing(blocks), self._key)
        write()

    def _read(self, job: Any, blocks: Blocks, read: Callable[[], None]) -> None:
        try:
            read()
        except OSError:
            self._check(job, blocks[: self._kept.get(job, 0)])  # the others were not read
            raise
        self._check(job, blocks)

    def _check(self, job: Any, blocks: Blocks) -> None:
        bad = damaged(blocks, self._key)
        if not bad:
            return
        for path in bad:
            self._lost.add(path)
            for file in (path, sum_path(path)):
                with contextlib.suppress(OSError):
                    os.remove(file)
            logger.warning("sawkv: a stored block is damaged and is removed: its tokens are computed again (%s)", path)
        self._kept[job] = next(i for i, (path, _) in enumerate(blocks) if path in bad)
        raise OSError(f"expected blocks with their checksums, got {len(bad)} of {len(blocks)} without")

    def _blocks(self, job: Any) -> Blocks:
        # vLLM before 0.28 calls chunks blocks.
        places = job.chunk_ids if hasattr(job, "chunk_ids") else job.block_ids
        size = self._block_size
        return [
            (self.file_mapper.get_file_name(key), self._flat[int(place) * size : (int(place) + 1) * size])
            for key, place in zip(job.keys, places, strict=True)
        ]


def open_folder(root: Path, key: str, written_with: dict[str, Any]) -> Path:
    """The private folder of the blocks that were written with this. Says which other blocks `root` holds, and what they
    differ in.

    Args:
        root: is made if it does not exist.
        key: `fingerprint(written_with)`.
        written_with: from `offload.bind`.

    Raises:
        UnsupportedError: another user owns the folder, or could write to it.
        SawkvError: it is not writable.
    """
    folder = root / key[:NAME_LENGTH]
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        check_private(folder)
        if folder.stat().st_mode & 0o077:  # a copy is often readable by others
            folder.chmod(0o700)
    except OSError as error:
        raise SawkvError(
            f"secondary tier of type sawkv_fs: expected a root_dir that can be written to, got {root}: {reason(error)}"
        ) from error
    if (folder / MANIFEST).exists():
        logger.info("sawkv: pages are read from and written to %s", folder)
        return folder
    with writing(folder / MANIFEST) as part:
        part.write_text(json.dumps(written_with, indent=1, sort_keys=True, default=str))
    logger.info("sawkv: pages are written to %s, which is new", folder)
    for manifest in sorted(root.glob(f"*/{MANIFEST}")):
        with contextlib.suppress(OSError, ValueError):  # another user's, or damaged
            found = differences(json.loads((folder / MANIFEST).read_text()), json.loads(manifest.read_text()))
            if found:
                rest = [f"and {len(found) - SAID} more"] * (len(found) > SAID)
                logger.warning(
                    "sawkv: pages in %s are not used: %s", manifest.parent, "; ".join([*found[:SAID], *rest])
                )
    return folder


def digest(path: str, content: memoryview, key: str) -> str:
    """Checksum of a block, which depends on its name and on what it was written with: 32 hex digits."""
    name = "/".join(Path(path).parts[-4:])  # rank, group and hash: blocks are not exchanged
    made = hashlib.blake2b(name.encode(), digest_size=16, key=bytes.fromhex(key))
    made.update(content)
    return made.hexdigest()


def missing(blocks: Blocks) -> Blocks:
    """The blocks that have no file yet. vLLM does not write the others, which have the checksum of who wrote them."""
    return [(path, content) for path, content in blocks if not os.path.exists(path)]


def write_sums(blocks: Blocks, key: str) -> None:
    """Write the checksum of each block where its file will be."""
    for path, content in blocks:
        with writing(Path(sum_path(path))) as part:
            part.write_text(digest(path, content, key))


def damaged(blocks: Blocks, key: str) -> list[str]:
    """Paths of the blocks whose checksum is missing or another."""
    found = []
    for path, content in blocks:
        try:
            expected = Path(sum_path(path)).read_text()
        except (OSError, ValueError):
            expected = ""
        if expected != digest(path, content, key):
            found.append(path)
    return found


def sum_path(path: str) -> str:
    return f"{path}.sum"


class _Pool:
    """vLLM's thread pool, with something of ours around each job, in the job's thread."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._around: Callable[[Callable[[], None]], None] | None = None

    @contextlib.contextmanager
    def around_each(self, around: Callable[[Callable[[], None]], None]) -> Iterator[None]:
        """Call `around` with each job that is queued within, in place of the job."""
        self._around = around
        try:
            yield
        finally:
            self._around = None

    def enqueue_load(self, job_id: Any, n_tasks: int, tasks: Iterable[Callable[[], None]]) -> None:
        self._pool.enqueue_load(job_id, 1, [self._wrapped(list(tasks))])

    def enqueue_store(self, job_id: Any, n_tasks: int, tasks: Iterable[Callable[[], None]]) -> None:
        self._pool.enqueue_store(job_id, 1, [self._wrapped(list(tasks))])

    def _wrapped(self, tasks: list[Callable[[], None]]) -> Callable[[], None]:
        """One task of all. vLLM 0.26 has one per block, and a block may be checked only when it is there."""
        if self._around is None:
            raise UnsupportedError("sawkv does not fit this vLLM: its file tier queues outside of submit_*")

        def run() -> None:
            for task in tasks:
                task()

        return functools.partial(self._around, run)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)
