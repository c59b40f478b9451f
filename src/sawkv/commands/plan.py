"""`sawkv plan`: how many tokens and requests fit on a GPU."""

from __future__ import annotations

import argparse

from sawkv.capacity import COMMON_CONTEXT
from sawkv.commands import options

SUMMARY = "predict how many tokens and requests fit on a GPU, in 16 bits, fp8 and a cache format"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_served_model(parser, ". A directory needs only config.json")
    either = parser.add_mutually_exclusive_group()
    options.add_format(either, "cache format to compare with 16 bits and fp8")
    either.add_argument(
        "--tokens",
        type=options.tokens,
        metavar="COUNT",
        help="in place of --format: take the format with the most bits that holds this many tokens, such as 2M",
    )
    parser.add_argument(
        "--gpu-memory", metavar="SIZE", help="memory of one card, for example 80GiB (default: that of the GPU here)"
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="TOKENS",
        help=f"longest request, as vLLM's --max-model-len (default: {COMMON_CONTEXT}, or the model's limit)",
    )
    parser.add_argument(
        "--weights",
        metavar="SIZE",
        help="size of all weights on the GPUs (default: measured in the files, or estimated)",
    )
    parser.add_argument(
        "--gpu-memory-utilization", type=float, default=0.92, metavar="SHARE", help="as in vLLM (default: %(default)s)"
    )
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="COUNT",
        help="as in vLLM: GPUs that share each layer (default: %(default)s)",
    )
    parser.add_argument(
        "--pipeline-parallel",
        type=int,
        default=1,
        metavar="COUNT",
        help="as in vLLM: stages, each with some of the layers (default: %(default)s)",
    )
    parser.add_argument(
        "--max-num-batched-tokens", type=int, metavar="COUNT", help="as in vLLM (default: that of a server)"
    )
    parser.add_argument("--max-num-seqs", type=int, metavar="COUNT", help="as in vLLM (default: that of a server)")
    parser.add_argument(
        "--language-model-only",
        action="store_true",
        help="as in vLLM: serve text alone, without the weights that read images",
    )
    parser.add_argument(
        "--no-enable-prefix-caching",
        action="store_true",
        help="as in vLLM: recurrent layers then hold one state per request",
    )
    parser.add_argument(
        "--speculative-config",
        metavar="JSON",
        help="as in vLLM: a draft model, or the model's own draft layers, with a cache in the same format, or in INT4"
        " below 4 bits",
    )
    for name, what in (("--mamba-ssm-cache-dtype", "of recurrences"), ("--mamba-cache-dtype", "of convolutions")):
        parser.add_argument(
            name,
            choices=("auto", "float32", "float16", "bfloat16"),
            default="auto",
            help=f"as in vLLM: the dtype of the states {what} (default: the model's)",
        )
    parser.add_argument(
        "--host-memory",
        metavar="SIZE",
        help="host memory for pages, of all cards together, as in vLLM's --kv-offloading-size: show what it adds",
    )
    parser.add_argument(
        "--prefill-speed",
        type=float,
        metavar="TOKENS",
        help="tokens of a prompt that the server computes per second, to compare with bringing a prefix back",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the plan. The exit status is 1 if a request of this length fits in no format."""
    from sawkv.capacity.run import run as plan
    from sawkv.integrations.vllm import refusals

    return plan(args, options.cache_format(args.format), refusals.of_format)
