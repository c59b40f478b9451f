"""The `sawkv` command: lists the subcommands, which are modules of `sawkv.commands`, and reports their errors."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence

from sawkv import __version__
from sawkv.errors import SawkvError
from sawkv.terminal import coloured

COMMANDS = ("serve", "doctor", "plan", "prepare", "formats", "eval", "analyze", "report", "bench", "demo")

INTERRUPTED, BROKEN_PIPE, TERMINATED, HUNG_UP = (
    128 + number for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGTERM, signal.SIGHUP)
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        The exit status: the subcommand's; 2 for bad input and files that cannot be read or written; 130 after Ctrl-C;
            143 after SIGTERM, 129 after SIGHUP.
    """
    if argv is None:
        argv = sys.argv[1:]
        end_as_by_ctrl_c()
    started, args = time.time(), argparse.Namespace()
    try:
        args = _parse(argv)
        if "device" in args:
            # The model runs in this process. On cores with other work, threads that spin while they wait for each other
            # take many times as long. PyTorch reads this when it is imported.
            os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        status: int = args.run(args)
        sys.stdout.flush()
    except SawkvError as error:
        return _fail(str(error), 2)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("sawkv"):
            raise
        return _fail(f"{argv[0]}: expected the package {error.name}, got none: pip install 'sawkv[eval]'", 2)
    except BrokenPipeError:  # the reader of the output, such as `head`, closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error), 2)
    except KeyboardInterrupt:
        return _fail(_interrupted(args, started), INTERRUPTED)
    return status


def end_as_by_ctrl_c() -> None:
    """Let SIGTERM, and SIGHUP of a closed terminal, end the program so too that it first ends what it started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # which nohup sets
        signal.signal(signal.SIGHUP, lambda *_: sys.exit(HUNG_UP))


def make_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the command line, and those of the subcommands."""
    parser = argparse.ArgumentParser(prog="sawkv", description="A 4-bit KV cache that serves faster than 16 bits.")
    parser.add_argument("--version", action="version", version=f"sawkv {__version__}")
    subparsers, made = parser.add_subparsers(required=True, metavar="COMMAND"), {}
    for name in COMMANDS:
        command = importlib.import_module(f"sawkv.commands.{name}")
        made[name] = subparsers.add_parser(name, help=command.SUMMARY, description=command.SUMMARY, allow_abbrev=False)
        command.add_arguments(made[name])
        made[name].set_defaults(run=command.run, command=name)
    return parser, made


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser, commands = make_parser()
    args, others = parser.parse_known_args(argv)
    if others and "engine_options" not in args:
        commands[args.command].error(f"unknown arguments: {' '.join(others)}")
    # Only vLLM knows whether an option takes the next word.
    if others and argv.index(others[0]) < argv.index(args.model):
        parser.error(f"{args.command}: expected MODEL before vLLM's options, got {others[0]} before it")
    args.engine_options = others
    args.typed = shlex.join(["sawkv", *argv])  # for the records that commands write
    return args


def _interrupted(args: argparse.Namespace, started: float) -> str:
    """What Ctrl-C leaves of a command's measurements."""
    out = getattr(args, "out", None)
    if out is None or not out.is_file() or out.stat().st_mtime < started:
        return "interrupted"
    kept = f"interrupted; {out} holds what was measured"
    return f"{kept}. The same command with --resume goes on" if "resume" in args else kept


def _fail(message: str, status: int) -> int:
    print(f"{coloured('sawkv:', 'red', sys.stderr)} {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
