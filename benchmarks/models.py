"""docs/models.md: which model families are served, from the records of `benchmarks.architectures`.

python -m benchmarks.architectures --engines vllm transformers --records docs/results/models.jsonl
python -m benchmarks.models --write docs/models.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.architectures import NOT_STARTED, REFUSED
from benchmarks.families import FAMILIES, SERVED

RECORDS: Final = Path(__file__).parents[1] / "docs" / "results" / "models.jsonl"
NOT_RUN: Final = "not run"
COLUMNS: Final = {("vllm", "CPU"): "vLLM, CPU", ("vllm", "GPU"): "vLLM, GPU", ("transformers", "CPU"): "SawCache, CPU"}
"""Titles by engine and device. One without records has no column."""
HEAD: Final = """# Which models run

Made by `python -m benchmarks.models` from the records in [results/models.jsonl](results/models.jsonl): to change a row,
run `python -m benchmarks.architectures` again. Each row is a tiny model with random weights and heads of its family.
`benchmarks/families.py` says what each is and what is expected of it. One that is served or refused otherwise fails
that command, and the tests take one of most kinds.

- **plain**: pages that are rotated and not quantized write the texts of the engine's own cache, up to near-ties.
- **INT4 x**: mean difference from 16 bits along the 16-bit text, in nats per token, unprepared. Random weights make
  4 bits look worse than they are. A wrong cache gives more than 1.
- **= simulated**: INT4's texts and log-probabilities are those of 32-bit pages that hold quantized rows, bit for bit.
- **not run**: no record. It says nothing about what would happen. [vllm.md](vllm.md#model-families) has families that
  a GPU served, in shapes nearer to their own.
- **not by vLLM here**: vLLM does not serve the tiny model there without sawkv either. The cell has its words.

Rows are of unprepared caches. SawCache cannot prepare Zamba2, whose layers call one attention module that does not know
whose turn it is; `prepare=False` or `"int8"` serve it.

A commit with a plus sign is one from which files differed. Qwen 3.5, Qwen3-VL and Gemma 3 4B to 27B on vLLM need
torchvision, which `make` leaves out. Without it that command expects vLLM's own refusal.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there, not to the terminal")
    args = parser.parse_args()
    text = page([json.loads(line) for line in RECORDS.read_text().splitlines()])
    if args.write:
        args.write.write_text(text)
    else:
        print(text, end="")
    return 0


def page(records: Sequence[Mapping[str, Any]]) -> str:
    """The whole page, in Markdown."""
    found = {
        (record["family"], record["engine"], "CPU" if record["device"] == "cpu" else "GPU"): record
        for record in records
    }
    tried = {(engine, device) for _, engine, device in found}
    columns = [column for column in COLUMNS if column in tried]
    header = ["stands for", "kind", "head_dim/KV heads", *(COLUMNS[column] for column in columns)]
    lines = [f"| {' | '.join(header)} |", f"|{'-|' * len(header)}"]
    for name, family in FAMILIES.items():
        cells = [_cell(found.get((name, engine, device))) for engine, device in columns]
        lines.append(
            f"| {family.models} (`{name}`) | {family.kind} | {family.heads or 'latent'} | {' | '.join(cells)} |"
        )
    versions = sorted({_version(record) for record in records})
    table = "\n".join(["<!-- models.jsonl -->", "", *lines, "", "<!-- end of models.jsonl -->"])
    return f"{HEAD}\n{table}\n\nRecords: {'; '.join(versions)}.\n"


def _version(record: Mapping[str, Any]) -> str:
    of_engine = f"vLLM {record['vllm']}" if record["engine"] == "vllm" else f"Transformers {record['transformers']}"
    return f"{of_engine} on {'a CPU' if record['device'] == 'cpu' else record['device']} at {record['commit']}"


def _cell(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return NOT_RUN
    checks, detail = record["checks"], record["detail"].replace("|", "\\|")
    if record["outcome"] == REFUSED:
        return f"refused: {detail.removeprefix('sawkv cannot serve this configuration: ').partition('. ')[0]}"
    if record["outcome"] == NOT_STARTED:
        return f"not by vLLM here: {detail[:80]}"
    if record["outcome"] != SERVED:
        return f"**wrong**: {', '.join(record['failed'])}"
    said = ["plain"] if "plain" in checks else []
    said += [f"INT4 {checks['int4'].split()[0]}"] if "int4" in checks else []
    said += ["= simulated"] if "simulated" in checks else []
    return f"served: {', '.join(said)}"


if __name__ == "__main__":
    sys.exit(main())
