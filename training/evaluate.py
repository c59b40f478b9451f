"""What a trained model can do: held-out perplexity, recall by task, length and depth, and some continuations.

    python -m training.evaluate models/sawkv-6m

Recall counts a task as right if the model's greedy choice is right at every token of the answer, as greedy decoding
needs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from training.data import Task, TaskMaker, Tokens

PROMPTS = (
    'def read_lines(path):\n    """Return the lines of a text file."""\n',
    "class Counter:\n    def __init__(self):\n        self.counts = {}\n\n    def add(self, key):\n",
    "import unittest\n\n\nclass TestParser(unittest.TestCase):\n    def test_empty(self):\n",
    "for i in range(",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", type=int, default=100, help="tasks of each kind and length")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4000])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    model.to(device)  # type: ignore[arg-type]
    model.train(False)
    held_out = np.load(args.model / "held_out.npz")["tokens"]
    figures: dict[str, object] = {"perplexity": perplexity(model, held_out)}
    print(figures, flush=True)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    tasks = TaskMaker(tokenizer, held_out, seed=12345)
    for length in args.lengths:
        by_depth = {
            depth: recall(model, [tasks.pass_key(length, depth) for _ in range(max(1, args.samples // 5))])
            for depth in (0, 0.25, 0.5, 0.75, 1)
        }
        row: dict[str, float] = {f"pass_key_depth_{depth}": share for depth, share in by_depth.items()}
        row["pass_key"] = sum(by_depth.values()) / len(by_depth)
        row["lookup"] = recall(model, [tasks.lookup(length) for _ in range(args.samples)])
        row["copy"] = recall(model, [tasks.copy(length) for _ in range(args.samples)])
        figures[str(length)] = {name: round(share, 4) for name, share in row.items()}
        print(length, figures[str(length)], flush=True)
    reader = AutoTokenizer.from_pretrained(args.model)
    for prompt in PROMPTS:
        ids = reader(prompt, return_tensors="pt").input_ids.to(device)
        continued: torch.Tensor = model.generate(ids, max_new_tokens=80, do_sample=False)  # type: ignore[operator]
        print("=" * 80, reader.decode(continued[0]), sep="\n", flush=True)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


@torch.inference_mode()
def perplexity(model: PreTrainedModel, ids: Tokens, length: int = 2048, rows: int = 16) -> float:
    """exp of the mean loss over the first `rows` windows of `length` tokens."""
    losses = []
    for start in range(0, min(rows * length, len(ids) - length), length):
        window = torch.from_numpy(ids[start : start + length].astype(np.int64))[None].to(model.device)
        losses.append(F.cross_entropy(model(window).logits[0, :-1].float(), window[0, 1:]).item())
    return round(float(np.exp(np.mean(losses))), 3)


@torch.inference_mode()
def recall(model: PreTrainedModel, tasks: list[Task]) -> float:
    """Share of answers that greedy decoding gets right."""
    right, asked = 0, 0
    for task in tasks:
        ids = torch.tensor([task.ids], device=model.device)
        choice = model(ids).logits[0, :-1].argmax(-1)
        for start, end in task.answers:
            right += bool((choice[start - 1 : end - 1] == ids[0, start:end]).all())
            asked += 1
    return right / asked


if __name__ == "__main__":
    main()
