"""Host time of the calls that vLLM makes of each layer, with the driver left out: on any CPU, without a GPU.

    python -m benchmarks.host_time                                      # this checkout
    git worktree add /tmp/before 99c9716
    python -m benchmarks.host_time --beside /tmp/before/src             # that one beside it, in turns

A GPU waits for Python where a step is short. Here the CUDA backend runs as it does on a GPU, up to the driver's launch,
which is a C function that does nothing. The layers are vLLM's, made by its constructor for a model of Qwen3-8B's heads,
with pages of a prepared model.

Both checkouts are measured in processes of their own, in turns of a fraction of a second, so that both see the same
load of the machine. Figures are the smallest of a checkout's turns, in us per call.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

TURNS = 30
CALLS = 40
Q_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, PAGES = 32, 8, 128, 64, 64
NUM_SEQS, CONTEXT = 8, 400
LAYER = ("vLLM's do_kv_cache_update", "vLLM's forward, decode", "vLLM's forward, prefill", "append", "gather")
"""What the sum is of."""
BESIDE = ("16 bits, do_kv_cache_update", "16 bits, forward", "metadata of a decode", "metadata of a prefill")
"""What is shown beside it: vLLM's own FlashAttention layer with kernels that do nothing, and what a step costs once."""


class _Gpu(str):
    """The name of the CPU, which passes for a GPU."""

    type = "cuda"


def _fake_driver() -> Any:
    """What `runtime` uses of `cuda.bindings.driver`: every call succeeds, every constant is 64."""
    constant = ctypes.c_int32(64)
    return SimpleNamespace(
        cuModuleGetFunction=lambda *_: (0, 1),
        cuModuleGetGlobal=lambda *_: (0, ctypes.addressof(constant), 4),
        cuMemcpyDtoH=lambda to, start, size: (ctypes.memmove(to, start, size), (0,))[1],
        cuFuncSetAttribute=lambda *_: (0,),
        CUfunction_attribute=SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8),
    )


def _without_a_gpu() -> None:
    """Have the CUDA backend run on CPU tensors, for the rest of this process."""
    import torch
    from vllm.v1.attention.backends import fa_utils

    from sawkv import kernels
    from sawkv.integrations.vllm import prefill
    from sawkv.kernels import cuda
    from sawkv.kernels.cuda import runtime

    nothing = ctypes.CDLL("libm.so.6").fegetround  # returns 0, whatever it is given
    properties = SimpleNamespace(multi_processor_count=132, major=9, minor=0)
    patches: tuple[tuple[Any, str, Any], ...] = (
        (runtime, "_driver", _fake_driver),
        (runtime, "_load_module", lambda *_: None),
        (runtime, "_libcuda", lambda: SimpleNamespace(cuLaunchKernelEx=nothing)),
        (cuda, "unsupported_reason", lambda *_: None),
        (kernels, "PREFERENCE", ("cuda",)),
        (torch._C, "_cuda_getCurrentRawStream", lambda _: 0),
        (torch.cuda, "get_device_properties", lambda _: properties),
        (fa_utils, "flash_attn_varlen_func", lambda **_: None),
        (prefill, "get_flash_attn_version", lambda **_: 3),
    )
    for target, name, value in patches:
        mock.patch.object(target, name, value, create=True).start()


def _calls() -> dict[str, Callable[[], object]]:
    """What is measured, ready to be called."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from sawkv import PagedKVCache, append, gather
    from sawkv.format.counters import new_counters
    from sawkv.format.spec import CacheFormat
    from sawkv.integrations.vllm import announce, backend, prefill
    from sawkv.integrations.vllm.config import engine_options

    _without_a_gpu()
    options = engine_options(CacheFormat("int4"), prepare=False)
    model = Path(__file__).parent.parent / "models" / "sawkv-6m"
    config = EngineArgs(str(model), block_size=PAGE_SIZE, max_num_seqs=NUM_SEQS, **options).create_engine_config()
    config.device_config.device_type = "cuda"
    with set_current_vllm_config(config):
        impl = backend.SawAttentionImpl(
            Q_HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS, kv_cache_dtype="int4_per_token_head"
        )
    impl.unprepared = True  # so that it has the centers, gains and feedback of a prepared model
    counters = new_counters("cpu")
    reader: Any = SimpleNamespace(
        counters=counters[None] if hasattr(impl, "reader_place") else counters, poll=lambda: None
    )
    impl.reader = reader
    layout = impl.layout(PAGE_SIZE)
    spec = mock.Mock(
        spec=FullAttentionSpec,
        block_size=PAGE_SIZE,
        unpadded_page_size_bytes=KV_HEADS * layout.span_bytes,
        page_size_bytes=KV_HEADS * layout.span_bytes,
        num_kv_heads=KV_HEADS,
        head_size=HEAD_DIM,
    )
    config.compilation_config.static_forward_context["layer.0"] = SimpleNamespace(impl=impl)
    gpu: Any = _Gpu("cpu")
    with (
        set_current_vllm_config(config),
        mock.patch.object(announce, "say_pages"),
        mock.patch.object(backend.SawMetadataBuilder, "_make_reader", return_value=reader),
    ):
        builder = backend.SawMetadataBuilder(spec, ["layer.0"], config, gpu)
    pages = torch.zeros(layout.pages_shape(PAGES), dtype=torch.uint8)

    def batch(num_new: int) -> Any:
        """vLLM's metadata of a step of NUM_SEQS requests of `num_new` tokens each."""
        total = NUM_SEQS * num_new
        starts, lengths = (
            torch.arange(NUM_SEQS + 1, dtype=torch.int32) * num_new,
            torch.full((NUM_SEQS,), CONTEXT, dtype=torch.int32),
        )
        return SimpleNamespace(
            num_reqs=NUM_SEQS,
            num_actual_tokens=total,
            max_query_len=num_new,
            max_seq_len=CONTEXT,
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=lengths,
            block_table_tensor=torch.zeros(NUM_SEQS, CONTEXT // PAGE_SIZE + 1, dtype=torch.int32),
            causal=True,
            is_prefilling=torch.full((NUM_SEQS,), num_new > 1),
        )

    def step(common: Any) -> tuple[Any, ...]:
        """Arguments of one layer, for such a step."""
        total = common.num_actual_tokens
        query, output = torch.zeros(2, total, Q_HEADS, HEAD_DIM, dtype=torch.bfloat16)
        fused = torch.zeros(total, 2 * KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
        metadata = builder.build(0, common)
        return query, fused[:, :KV_HEADS], fused[:, KV_HEADS:], torch.arange(total), metadata, output

    assert impl.prefill is not None
    workspace = torch.zeros(2, impl.prefill.capacity, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    mock.patch.object(prefill.FlashPrefill, "workspace", return_value=(workspace[0], workspace[1])).start()
    layer: Any = None
    short, long = batch(1), batch(CONTEXT // 2)
    q, k, v, slots, decode, out = step(short)
    long_q, long_k, long_v, long_slots, prefills, long_out = step(long)
    impl.do_kv_cache_update(layer, k, v, pages, slots)
    cache = impl._bind(pages)
    cache = getattr(cache, "cache", cache)
    assert isinstance(cache, PagedKVCache)
    assert cache.k_center is not None
    assert cache.k_feedback is not None
    (piece,) = next(iter(prefills.prefills.values()))
    keys = workspace[:, : piece.num_keys]
    where = getattr(piece, "prefixes", piece)  # a checkout from before schedules has them in the slice
    lengths = where.block_table, where.seq_lens, piece.cu_seqlens_k if where is piece else where.cu_seq_lens
    return {
        "vLLM's do_kv_cache_update": lambda: impl.do_kv_cache_update(layer, k, v, pages, slots),
        "vLLM's forward, decode": lambda: impl.forward(layer, q, k, v, pages, decode, out),
        "vLLM's forward, prefill": lambda: impl.forward(layer, long_q, long_k, long_v, pages, prefills, long_out),
        "append": lambda: append(k, v, cache, slots),
        "gather": lambda: gather(cache, *lengths, keys[0], keys[1], rotated=False),
        **_calls_in_16_bits(long, long_q, long_k, long_v, long_slots, long_out),
        "metadata of a decode": lambda: builder.build(0, short),
        "metadata of a prefill": lambda: builder.build(0, long),
    }


def _calls_in_16_bits(common: Any, q: Any, k: Any, v: Any, slots: Any, out: Any) -> dict[str, Callable[[], object]]:
    """The same calls of vLLM's own FlashAttention layer, for a step of prefills."""
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.v1.attention.backends import flash_attn

    def nothing(*_: object, **__: object) -> None:
        pass

    for name in ("flash_attn_varlen_func", "reshape_and_cache_flash"):
        mock.patch.object(flash_attn, name, nothing, create=True).start()
    for name, value in (("get_flash_attn_version", 3), ("flash_attn_supports_quant_query_input", False)):
        mock.patch.object(flash_attn, name, return_value=value, create=True).start()
    with set_current_vllm_config(VllmConfig()):
        impl: Any = flash_attn.FlashAttentionImpl(Q_HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS, None, None, "auto")
    pages = torch.zeros(PAGES, KV_HEADS, PAGE_SIZE, 2 * HEAD_DIM, dtype=torch.bfloat16)
    metadata = SimpleNamespace(
        num_actual_tokens=common.num_actual_tokens,
        query_start_loc=common.query_start_loc,
        seq_lens=common.seq_lens,
        block_table=common.block_table_tensor,
        max_query_len=common.max_query_len,
        max_seq_len=common.max_seq_len,
        causal=True,
        use_cascade=False,
        scheduler_metadata=None,
        max_num_splits=0,
        mm_prefix_query_range_tensor=None,
        rswa_prefix_lens=None,
    )
    layer = SimpleNamespace(**{f"_{x}_scale": torch.ones(1) for x in "qkv"})
    return {
        "16 bits, do_kv_cache_update": lambda: impl.do_kv_cache_update(layer, k, v, pages, slots),
        "16 bits, forward": lambda: impl.forward(layer, q, k, v, pages, metadata, out),
    }


def _work() -> None:
    """Measure one turn for each line of input, and print it as a line of JSON: us a call, by name."""
    calls = _calls()
    for call in calls.values():
        call()
    print("ready", flush=True)
    for _ in sys.stdin:
        turn = {}
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            turn[name] = (time.perf_counter() - start) / CALLS * 1e6
        print(json.dumps(turn), flush=True)


def _start(source: Path) -> subprocess.Popen[str]:
    root = Path(__file__).parent.parent
    environment = os.environ | {
        "PYTHONPATH": f"{source}{os.pathsep}{root}",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "benchmarks.host_time", "--worker"]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=source
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--beside", type=Path, help="the src folder of another checkout, measured in turns with this one"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _work()
        return
    here = Path(__file__).parent.parent / "src"
    sources = {"here": here} | ({} if arguments.beside is None else {"beside": arguments.beside.resolve()})
    workers = {name: _start(source) for name, source in sources.items()}
    try:
        least = {name: dict.fromkeys((*LAYER, *BESIDE), float("inf")) for name in workers}
        for worker in workers.values():
            assert worker.stdout is not None
            while worker.stdout.readline().strip() != "ready":
                if worker.poll() is not None:
                    raise SystemExit("a worker ended before it was ready; its error is above")
        for _ in range(TURNS):
            for name, worker in workers.items():
                assert worker.stdin is not None
                assert worker.stdout is not None
                worker.stdin.write("\n")
                worker.stdin.flush()
                turn = json.loads(worker.stdout.readline())
                least[name] = {call: min(us, turn[call]) for call, us in least[name].items()}
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    print(f"| us a call | {' | '.join(least)} |" + (" here / beside |" if "beside" in least else ""))
    print("|-|" + "-|" * (len(least) + ("beside" in least)))
    for row in (*LAYER, "sum", *BESIDE):
        us = [sum(times[call] for call in LAYER) if row == "sum" else times[row] for times in least.values()]
        print(f"| {row} | {' | '.join(f'{x:.1f}' for x in us)} |" + (f" {us[0] / us[1]:.2f} |" if len(us) == 2 else ""))


if __name__ == "__main__":
    main()
