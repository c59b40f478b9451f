"""SawCache in Transformers' `generate`, with the model that this repository ships: a minute, no download, no GPU.

    python examples/transformers_generate.py

Hides a number in a long text, lets the model find it again with 16-bit K and V and with INT4 pages, and prints what
each cache holds and how fast it decodes. The first SawCache prepares the model, which takes seconds, once. Then: a
padded batch, beams, prompt lookup, and a conversation that goes on.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, logging

from sawkv.integrations.transformers import SawCache

MODEL = Path(__file__).resolve().parents[1] / "models" / "sawkv-6m"


def main() -> None:
    logging.disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16, attn_implementation="sawkv").eval()
    tokenizer.pad_token = tokenizer.eos_token
    model.generation_config.pad_token_id = tokenizer.pad_token_id

    print("A long text, greedy")
    filler = "".join(f"def function_{i}(x):\n    return x + {i}\n\n\n" for i in range(40))
    text = (
        filler
        + "The pass key is 48213. Remember it. 48213 is the pass key.\n\n\n"
        + filler
        + "What is the pass key? The pass key is"
    )
    inputs = tokenizer(text, return_tensors="pt")
    for name, cache, attention in (
        ("DynamicCache", DynamicCache(config=model.config), "sdpa"),
        ("SawCache", SawCache(model), "sawkv"),
    ):
        model.set_attn_implementation(attention)
        model.generate(**inputs, past_key_values=cache, max_new_tokens=1)
        # The prompt is in the cache: one step.
        longer = model.generate(**inputs, past_key_values=cache, max_new_tokens=2)
        started = time.perf_counter()
        out = model.generate(longer, past_key_values=cache, max_new_tokens=62)
        speed = 62 / (time.perf_counter() - started)
        held = (
            cache.nbytes
            if isinstance(cache, SawCache)
            else sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        )
        found = tokenizer.decode(out[0, inputs.input_ids.shape[1] :][:8])
        print(f"  {name:<13}{cache.get_seq_length():>6} tokens {held / 2**20:6.2f} MiB {speed:6.0f} tok/s   {found!r}")

    print("A batch of unequal prompts, left-padded")
    prompts = [
        "import os\n\n\ndef list_files(path):\n",
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 24, "do_sample": False}
    for row in model.generate(**batch, past_key_values=SawCache(model), **options)[:, batch.input_ids.shape[1] :]:
        print(f"  {tokenizer.decode(row, skip_special_tokens=True)!r}")

    print("Three beams")
    out = model.generate(**batch, past_key_values=SawCache(model), num_beams=3, **options)
    print(f"  {tokenizer.decode(out[1, batch.input_ids.shape[1] :], skip_special_tokens=True)!r}")

    print("Prompt lookup: drafts are checked eight at a time, and taken back where they are wrong")
    one = tokenizer(prompts[1], return_tensors="pt")
    passes: list[object] = []
    hook = model.register_forward_hook(lambda *_: passes.append(None))
    out = model.generate(**one, past_key_values=SawCache(model), max_new_tokens=60, prompt_lookup_num_tokens=7)
    hook.remove()
    print(f"  {out.shape[1] - one.input_ids.shape[1]} tokens in {len(passes)} passes")

    print("A conversation that goes on with one cache")
    cache, ids = SawCache(model), one.input_ids
    for addition in ("", "\n    def pop(self):\n", "\n    def __len__(self):\n"):
        if addition:
            ids = torch.cat([ids, tokenizer(addition, return_tensors="pt").input_ids], 1)
        ids = model.generate(ids, past_key_values=cache, max_new_tokens=16, do_sample=False)
        print(f"  {cache.get_seq_length():>4} tokens held: ...{tokenizer.decode(ids[0, -16:])!r}")


if __name__ == "__main__":
    main()
