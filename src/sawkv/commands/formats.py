"""`sawkv formats`: lists the formats, and when to take each."""

from __future__ import annotations

import argparse
import textwrap

from sawkv.format.spec import COMMON_HEAD_DIM, CacheFormat

SUMMARY = "list the cache formats and other methods, and when to use each"
WIDTH = 80
_WHEN = {
    "int4": "The default. With preparation it is near 16 bits. See what it costs on your model: sawkv eval.",
    "int4v3": "Where int4 holds too few tokens. Errors of V cost less than those of K.",
    "int3": "Likewise. Compare what your model loses: sawkv eval --formats prepared,prepared_int4v3,prepared_int3.",
    "int3v2": "For models that lose little at int3. There are int4v2 and int2 too.",
    "int8": "Where INT4 costs too much. It needs no preparation.",
    "bf16": (
        "A control, for models in bfloat16: it saves nothing and loses nothing. fp16 and fp32 are the same for other"
        " dtypes."
    ),
}
"""By codec. 16 and 32 bits share one row."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    from sawkv.format.layout import PageLayout
    from sawkv.lab.methods import METHODS

    print(f"{'--format':<10}{'bits':>6}{'tokens':>8}  when to take it (figures of head_dim {COMMON_HEAD_DIM})")
    for name, when in _WHEN.items():
        nbytes = PageLayout(CacheFormat(name).resolve(COMMON_HEAD_DIM), 1, COMMON_HEAD_DIM, 16).token_bytes
        start = f"{name:<10}{4 * nbytes / COMMON_HEAD_DIM:>6.2f}{4 * COMMON_HEAD_DIM / nbytes:>7.2f}x  "
        print(textwrap.fill(when, WIDTH, initial_indent=start, subsequent_indent=" " * len(start)))
    print()
    print(
        _filled(
            "int4-k64-v0 and the like name the rotation orders of K and V: 0, or powers of two from 16 that divide"
            " head_dim. -r32 at the end, as in int4-r32, keeps the newest 32 tokens of each request in 16 bits too, in"
            " vLLM from 0.32: prepared_int4-r32 for `sawkv eval`."
        )
    )
    print(_filled("`sawkv eval` and `sawkv analyze` compare them with more methods, by --formats:"))
    print(textwrap.fill(", ".join(METHODS), WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))
    print(
        _filled(
            "`prepared` is what engines do with int4, and `int4` is that without preparation. `fp8` and `vllm_...` are"
            " vLLM's own. sawkv.lab.methods has a file for each of the others, with its paper."
        )
    )
    return 0


def _filled(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)
