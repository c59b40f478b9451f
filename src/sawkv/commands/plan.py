"""`sawkv plan`: what fits on a GPU."""

from __future__ import annotations

import argparse

from sawkv.commands import options

SUMMARY = "predict what fits on a GPU, in 16 bits and in a cache format, before anything starts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_served_model(parser, "; of a directory config.json is enough")
    options.add_format(parser, "cache format to compare with 16 bits")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="of one card as sold, for example 80GiB (default: what CUDA reports here)")
    parser.add_argument(
        "--context", type=int, default=16384, metavar="TOKENS", help="longest request, vLLM's --max-model-len (default: %(default)s)"
    )
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.90, metavar="SHARE", help="vLLM's (default: %(default)s)")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="COUNT", help="cards that share the model (default: %(default)s)")
    parser.add_argument("--max-num-batched-tokens", type=int, metavar="COUNT", help="vLLM's (default: that of a server)")
    parser.add_argument("--max-num-seqs", type=int, metavar="COUNT", help="vLLM's (default: that of a server)")


def run(args: argparse.Namespace) -> int:
    from sawkv import capacity
    from sawkv.format.spec import CacheFormat

    setting = capacity.Setting(
        capacity.card_memory(args.gpu_memory),
        args.context,
        gpu_memory_utilization=args.gpu_memory_utilization,
        tensor_parallel=args.tensor_parallel,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_num_seqs=args.max_num_seqs,
    )
    shape, weight_bytes = capacity.read_model(args.model)
    formats = [capacity.WIDE, CacheFormat.parse(args.format).resolve(shape.head_dim)]
    print(capacity.report([capacity.make_plan(shape, setting, cache_format, weight_bytes) for cache_format in formats], setting))
    return 0
