"""The prompts of this folder's tasks: facts in a model's held-out text, drawn as those of `sawkv eval` are.

    python -m benchmarks.lm_eval.make_prompts models/sawkv-6m

writes them here.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from sawkv.lab.tasks import make_prompts
from sawkv.prepare.model import load_tokenizer
from sawkv.prepare.text import load_text

FOLDER = Path(__file__).parent
LENGTHS = (512, 1024, 1920)
COUNT = 4
"""Prompts for each task, length and depth."""
TABLE = re.compile(r"\ntable = \{\n((?:    \"[a-z]{4}\": \"[a-z]{4}\",\n){4})\}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    for name, text in make_files(parser.parse_args().model).items():
        (FOLDER / name).write_text(text, encoding="utf-8")


def make_files(model: Path) -> dict[str, str]:
    """Texts by file name: passkey.jsonl, where a number is to be continued, and table.jsonl, where one of the four
    values of a table is to be chosen."""
    tokenizer, text = load_tokenizer(model), load_text(model, None)
    lines: dict[str, list[str]] = {"passkey": [], "needle": []}
    for prompt in make_prompts(text.encode, text.ids, (), lengths=LENGTHS, count=COUNT, seed=5):
        end = -prompt.answer_length
        question, answer = (str(tokenizer.decode(list(ids))) for ids in (prompt.ids[:end], prompt.ids[end:]))
        fields: dict[str, object] = {
            "prompt": question,
            "answer": answer.strip(),
            "length": prompt.length,
            "depth": prompt.depth,
        }
        if prompt.task == "needle":
            fields["choices"] = _values(question)
        lines[prompt.task].append(json.dumps(fields) + "\n")
    return {"passkey.jsonl": "".join(lines["passkey"]), "table.jsonl": "".join(lines["needle"])}


def _values(question: str) -> list[str]:
    """The values of the table in a prompt, in order; one of them is the answer."""
    table = TABLE.search(question)
    if table is None:
        raise ValueError(f"expected a table of four entries, got {question!r}")
    return re.findall(r": \"([a-z]{4})\"", table[1])


if __name__ == "__main__":
    main()
