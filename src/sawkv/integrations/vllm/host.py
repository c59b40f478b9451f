"""vLLM's tiered offloading on a CPU, where pages are in host memory already.

vLLM copies pages between a GPU and host memory. On a CPU these copies are ours, and all else is vLLM's: which blocks
are stored, evicted and loaded, and the tiers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from sawkv.errors import UnsupportedError


class HostTieringSpec(TieringOffloadingSpec):
    """`spec_name` on a CPU. Elsewhere it is vLLM's `TieringOffloadingSpec`."""

    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        if not current_platform.is_cpu():
            worker: OffloadingWorker = super().get_worker(kv_caches)
            return worker
        if self.blocks_per_chunk != 1:
            raise UnsupportedError(
                "kv_connector_extra_config: expected no block_size beside HostTieringSpec on a CPU, got one of"
                f" {self.blocks_per_chunk} blocks"
            )
        spec: Any = self
        older = hasattr(spec, "num_blocks")  # vLLM before 0.28 calls chunks blocks
        names = ("num_blocks", "kv_bytes_per_block") if older else ("num_chunks", "kv_bytes_per_chunk")
        count = spec.num_blocks if older else spec.num_chunks
        options: dict[str, Any] = dict(zip(names, (count, self.kv_bytes_per_chunk), strict=True))
        region: Any = SharedOffloadRegion(
            engine_id=self.config.engine_id,
            rank=self.config.parallel.rank,
            cpu_page_size=self.cpu_page_size_per_worker,
            **options,
        )
        view = region.create_next_view if older else region.create_next_worker_view
        pages = [each.tensor.view(torch.int8).view(-1, each.page_size_bytes) for each in kv_caches.tensors]
        return _Copies(pages, [view(page.shape[1]) for page in pages], region)


class _Copies(OffloadingWorker):
    """Copies whole blocks at once.

    Args:
        pages: the engine's, [num_blocks, bytes] int8 each.
        stored: the same tensors' places in host memory, [num_chunks, bytes] int8 each.
        region: that memory.
    """

    def __init__(
        self, pages: Sequence[torch.Tensor], stored: Sequence[torch.Tensor], region: SharedOffloadRegion
    ) -> None:
        self._pages, self._stored, self._region = pages, list(stored), region
        self._finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, self._pages, src_spec.block_ids, self._stored, dst_spec.block_ids)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, self._stored, src_spec.block_ids, self._pages, dst_spec.block_ids)

    def _copy(self, job_id: int, sources: Any, places: Any, targets: Any, others: Any) -> bool:
        started = time.perf_counter()
        for source, target in zip(sources, targets, strict=True):
            target[torch.from_numpy(others).long()] = source[torch.from_numpy(places).long()]
        size = len(places) * sum(page.shape[1] for page in self._pages)
        seconds = time.perf_counter() - started
        self._finished.append(TransferResult(job_id=job_id, success=True, transfer_size=size, transfer_time=seconds))
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Copies are done when they are submitted."""

    def shutdown(self) -> None:
        self._stored.clear()
        self._region.cleanup()  # removes its file in /dev/shm
