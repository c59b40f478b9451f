"""The prompts of this folder's tasks: facts in a model's held-out text, drawn as those of `sawkv eval` are.

    python -m benchmarks.lm_eval.make_prompts models/sawkv-6m

writes passkey.jsonl, where a number is to be continued, and table.jsonl, where one of the four values of a table is to
be chosen.
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
TABLE = re.compile(r"\ntable = \{\n((?:    \"[a-z]{4}\": \"[a-z]{4}\",\n){4})\}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[512, 1024, 1920], metavar="TOKENS", help="default: %(default)s"
    )
    parser.add_argument(
        "--count", type=int, default=4, help="prompts for each task, length and depth (default: %(default)s)"
    )
    args = parser.parse_args()
    tokenizer, text = load_tokenizer(args.model), load_text(args.model, None)
    lines: dict[str, list[str]] = {"passkey": [], "needle": []}
    for prompt in make_prompts(text.encode, text.ids, (), lengths=args.lengths, count=args.count, seed=5):
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
    (FOLDER / "passkey.jsonl").write_text("".join(lines["passkey"]))
    (FOLDER / "table.jsonl").write_text("".join(lines["needle"]))


def _values(question: str) -> list[str]:
    """The values of the table in a prompt, in order; one of them is the answer."""
    table = TABLE.search(question)
    if table is None:
        raise ValueError(f"expected a table of four entries, got {question!r}")
    return re.findall(r": \"([a-z]{4})\"", table[1])


if __name__ == "__main__":
    main()
