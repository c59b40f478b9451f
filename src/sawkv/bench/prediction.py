"""The number of tokens that a cache will hold, predicted by `sawkv plan` for a server's options."""

from __future__ import annotations

from collections.abc import Sequence

from sawkv.bench.records import FP8, SIXTEEN_BITS
from sawkv.capacity import CPU_BLOCK, caches, memory
from sawkv.capacity.model import read_shape
from sawkv.capacity.weights import weights_of
from sawkv.checkpoint import read_checkpoint
from sawkv.errors import SawkvError
from sawkv.format.spec import CacheFormat
from sawkv.integrations.vllm.options import Options


def predict(model: str, cache: str, words: Sequence[str], context: int, *, on_gpu: bool) -> int | None:
    """Tokens, or None if `sawkv plan` cannot predict them.

    Args:
        model: a checkpoint directory, or a name on the hub.
        cache: a name as in `records.Served`.
        words: vLLM's options.
        context: its `--max-model-len`.
        on_gpu: whether vLLM runs on a GPU. On a CPU only `--kv-cache-memory-bytes` gives the size of the cache.
    """
    options = Options(words)
    nbytes = options.whole("--kv-cache-memory-bytes", 0)
    try:
        checkpoint = read_checkpoint(model)
        if checkpoint is None or not (on_gpu or nbytes):
            return None
        shape = read_shape(checkpoint.config, options.has("--language-model-only"))
        wide, fp8 = caches.engine_caches(shape)
        stored = {SIXTEEN_BITS: wide, FP8: fp8}.get(cache) or caches.KVCache.of_format(CacheFormat.parse(cache), shape)
        gpu_memory, name = memory.card(None) if on_gpu else (memory.GIB, "")
        setting = memory.Setting(
            gpu_memory,
            context,
            name,
            gpu_memory_utilization=float(
                options.get("--gpu-memory-utilization") or memory.Setting.gpu_memory_utilization
            ),
            tensor_parallel=options.whole("--tensor-parallel-size", 1),
            max_num_batched_tokens=options.whole("--max-num-batched-tokens", 0) or None,
            max_num_seqs=options.whole("--max-num-seqs", 0) or None,
            block_size=None if on_gpu else CPU_BLOCK,
            prefix_caching=not options.has("--no-enable-prefix-caching"),
        )
        if nbytes:
            blocks = memory.cut_blocks(shape, setting, stored)
            return int(nbytes // blocks.nbytes / blocks.of_request * context)
        weights = weights_of(checkpoint, shape, options.has("--language-model-only"))
        return memory.make_plan(shape, setting, stored, weights.nbytes).tokens
    except SawkvError:  # a model that `sawkv plan` refuses may be served all the same
        return None
