"""Tables inside hand-written pages, made from the records in docs/results.

    python -m benchmarks.docs_tables

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. Its figures stand nowhere else by hand:
tests/test_docs_figures.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from benchmarks.plots import RESULTS, Record, loads_of_readme, markdown, read_records

ROOT: Final = Path(__file__).parents[1]
MARKED: Final = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

OURS: Final = "int4-k128-v128"
PEERS: Final = ("fp8", "vllm_int4_per_token_head", OURS)
LOADS: Final = {
    "16384/1024 x 64": "64 requests, 16k tokens in, 1k out",
    "256/1024 x 256": "256 requests, 256 tokens in, 1k out",
    "12288+4096/512 x 64": "64 requests, 16k tokens in (12k of them shared), 512 out",
    "256/1024 x 1": "1 request, 256 tokens in, 1k out",
}
"""Loads of `benchmarks.serving`, and how README names them."""
NOT_MEASURED: Final = "not timed"
WINDOW: Final = 512
"""Tokens of the windows whose perplexity README shows."""

FITTED: Final = {
    "prepared": "**prepared**",
    "int4": "nothing fitted",
    "int4_center": "centers of plain means",
    "int4_center_feedback": "and feedback",
    "unweighted": "and gains",
    "vllm_int4_per_token_head": "vLLM's int4_per_token_head",
    "channel_keys_g64": "K by channel in groups of 64 tokens, as KIVI and quanto (not token-wise)",
    "q4_0_rotated": "llama.cpp's q4_0 after our rotation",
    "lloyd_max": "TurboQuant's codebook",
    "fp8": "fp8",
}
"""Methods of the table in docs/calibration.md."""


def main() -> None:
    for page in PAGES:
        (ROOT / page).write_text(filled((ROOT / page).read_text()))


def filled(page: str) -> str:
    """The page with all of its tables made again."""
    return MARKED.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", page)


def loads() -> str:
    """Serving speed on one card, and perplexity on the real checkpoints, of each cache."""
    latest = loads_of_readme(read_records(RESULTS / "serving.jsonl"))
    rows: list[list[str]] = []
    for load, what in LOADS.items():
        base, *peers = [latest.get((load, name)) for name in ("bf16", *PEERS)]
        assert base is not None
        if not rows:
            held = [f"{r['kv_tokens'] / base['kv_tokens']:.2f}x" if r else NOT_MEASURED for r in peers]
            rows.append(["tokens held", f"{base['kv_tokens']:,}", *held])
        speeds = [_speed(r, base) if r else NOT_MEASURED for r in peers]
        rows.append([what, f"{base['output_tok_s']:,.0f} tok/s, {base['ttft_mean_s']:.3g} s", *speeds])
    served = {
        (r["model"], r["method"]): r
        for r in read_records(RESULTS / "real_models.jsonl")
        if r["through"] == "server" and r["text"] == "prose" and r["window"] == WINDOW
    }
    for model in dict.fromkeys(model for model, _ in served):
        found = [served.get((model, method)) for method in ("fp8", "vllm_int4_per_token_head", "served")]
        (wide,) = {r["ppl_16bit"] for r in found if r}  # of the same text
        rows.append([f"perplexity of prose, {model}", f"{wide:.2f}", *(_change(r) for r in found)])
    for row in rows:
        row[-1] = f"**{row[-1]}**"
    return markdown(["", "BF16", "fp8", "vLLM's INT4", "**sawkv**"], rows)


def fitted() -> str:
    """Mean KL by what is fitted, and of other methods, prose / Python."""
    records = [r for r in read_records(RESULTS / "real_models.jsonl") if r["commit"] == "c8d26b5"]
    models = list(dict.fromkeys(r["model"] for r in records))
    found = {(r["model"], r["text"], r["method"]): r for r in records}
    rows = []
    for method, what in FITTED.items():
        pairs = [[found[model, text, method] for text in ("prose", "python")] for model in models]
        bits = ", ".join(dict.fromkeys(f"{pair[0]['bits']:.4g}" for pair in pairs))
        rows.append([what, bits, *(" / ".join(_kl(r) for r in pair) for pair in pairs)])
    return markdown(["", "bits", *models], rows)


def contexts() -> str:
    """Mean KL by the longest context that a model was prepared for, prose / Python."""
    records = [r for r in read_records(RESULTS / "real_models.jsonl") if r["commit"] == "10c636d"]
    models = list(dict.fromkeys(r["model"] for r in records))
    longest = {model: max(r.get("context") or 0 for r in records if r["model"] == model) for model in models}
    rows = []
    for what, method, context in (
        ("prepared for 1,024 tokens", "prepared", lambda model: 1024),
        ("**prepared for the whole context**", "prepared", lambda model: longest[model]),
        ("vLLM's int4_per_token_head", "vllm_int4_per_token_head", lambda model: None),
        ("fp8", "fp8", lambda model: None),
    ):
        cells = []
        for model in models:
            key = (model, method, context(model))
            pair = [_kl(r) for r in sorted(records, key=lambda r: r["text"] != "prose") if _key(r, key[2]) == key]
            cells.append(" / ".join(pair))
        rows.append([what, *cells])
    return markdown(["", *(f"{model}, to {longest[model]:,}" for model in models)], rows)


def _key(r: Record, context: int | None) -> tuple[str, str, int | None]:
    return r["model"], r["method"], r.get("context") if context else None


def _kl(r: Record) -> str:
    return f"{r['mean_kl']:.2f}" if r["mean_kl"] >= 1 else f"{r['mean_kl']:.4f}"


def _speed(r: Record, base: Record) -> str:
    return f"{r['output_tok_s'] / base['output_tok_s']:.2f}x, {r['ttft_mean_s'] / base['ttft_mean_s']:.2f}x"


def _change(r: Record | None) -> str:
    return f"{r['ppl'] / r['ppl_16bit'] - 1:+.1%}" if r else "does not start"


TABLES: Final[dict[str, Callable[[], str]]] = {"loads": loads, "fitted": fitted, "contexts": contexts}
PAGES: Final[Sequence[str]] = ("README.md", "docs/calibration.md")


if __name__ == "__main__":
    main()
