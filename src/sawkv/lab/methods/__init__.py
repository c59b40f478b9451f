"""Methods of storing K and V behind one interface (`base`), one file per method. `METHODS` lists them; `find_method`
finds one by name.

Each cache format of sawkv is a method too, by its own name, such as `int4-k64-v0`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sawkv.errors import FormatError
from sawkv.format.spec import CacheFormat
from sawkv.lab.methods.base import Method, Quantizer
from sawkv.lab.methods.centered import Centered
from sawkv.lab.methods.channel_keys import Grouped
from sawkv.lab.methods.feedback import FedBack
from sawkv.lab.methods.float8 import Float8
from sawkv.lab.methods.hessian import HessianAware
from sawkv.lab.methods.integer import Coded
from sawkv.lab.methods.kmeans import KMeans
from sawkv.lab.methods.kvarn import KEPT as KVARN_KEPT
from sawkv.lab.methods.kvarn import KVarN
from sawkv.lab.methods.lloyd_max import LloydMax
from sawkv.lab.methods.low_rank import LowRank
from sawkv.lab.methods.oscar import K_QUANTILE, V_QUANTILE, Clipped, Oscar
from sawkv.lab.methods.oscar import KEPT as OSCAR_KEPT
from sawkv.lab.methods.outliers import Outliers
from sawkv.lab.methods.prepared import Prepared
from sawkv.lab.methods.q4_0 import Q40
from sawkv.lab.methods.range_search import RangeSearched
from sawkv.lab.methods.rotated import Rotated
from sawkv.lab.methods.vllm_int4 import VllmInt4
from sawkv.lab.samples import LayerSample
from sawkv.prepare.states import Kept, LayerReaders


def served_format(cache_format: CacheFormat, name: str | None = None) -> Method:
    """A cache format of sawkv as a method, under the format's own name or another."""
    rotates = cache_format.quantized or cache_format.k_rotation_order is not None
    k, v = (
        Rotated(code, order) if rotates and order != 0 else code
        for code, order in (
            (Coded(cache_format.k_codec), cache_format.k_rotation_order),
            (Coded(cache_format.v_codec), cache_format.v_rotation_order),
        )
    )
    return Method(name or str(cache_format), k, v, served="sawkv", format=cache_format, kept=_recent(cache_format))


def _recent(cache_format: CacheFormat) -> Kept | None:
    return Kept(last=cache_format.recent) if cache_format.recent else None


def _prepared(name: str, codec: str, kept: Kept | None = None) -> Method:
    """A cache format as engines serve it, after they have prepared the model. Of `kept` they keep the last tokens
    alone, by a format's name.
    """
    own = CacheFormat(codec)
    k, v = (Rotated(FedBack(codec)) for codec in (own.k_codec, own.v_codec))
    return Prepared(name, k, v, calibrated=True, served="" if kept else "sawkv", format=own, kept=kept)


def _both(name: str, quantizer: Quantizer, *, calibrated: bool = False, served: str = "") -> Method:
    return Method(name, quantizer, quantizer, calibrated, served)


_INT4 = Coded("int4")
_ROTATED = Rotated(_INT4)
_FED_BACK = Rotated(FedBack())
_KVARN = Method("kvarn_codes", KVarN(4, by_channel=True), KVarN(2, by_channel=False))
_OSCAR = Oscar("oscar_codes", Clipped(K_QUANTILE), Clipped(V_QUANTILE), calibrated=True)

# `prepared` is served by default. `int4` is the same format unprepared, as under `--no-prepare`. Formats of fewer bits
# are named with theirs. Rivals' codes are there with and without the tokens that they keep in 16 bits, and so are the
# formats of about as many bits.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        _prepared("prepared", "int4"),
        *(_prepared(f"prepared_{codec}", codec) for codec in ("int4v3", "int3", "int4v2", "int3v2", "int2")),
        _both("fp8", Float8(), calibrated=True, served="vllm"),
        _both("vllm_int4_per_token_head", VllmInt4(), served="vllm"),
        served_format(CacheFormat("int8", 0, 0), "int8_plain"),
        served_format(CacheFormat("int4", 0, 0), "int4_plain"),
        _both("int4_signs", Rotated(_INT4, signs=True)),
        _both("int4_range_search", Rotated(RangeSearched())),
        _both("int4_center", Centered(_ROTATED), calibrated=True, served="sawkv"),
        _both("int4_center_feedback", Centered(_FED_BACK), calibrated=True, served="sawkv"),
        Method("int4_center_k", Centered(_ROTATED), _ROTATED, calibrated=True, served="sawkv"),
        Method("int4_center_v", _ROTATED, Centered(_ROTATED), calibrated=True, served="sawkv"),
        _both("int4_center_range_search", Centered(Rotated(RangeSearched())), calibrated=True),
        _both("int4_center_plain", Centered(_INT4), calibrated=True, served="sawkv"),
        _both("int4_outliers", Outliers(_INT4, 4)),
        _both("int4_outliers_rotated", Outliers(_ROTATED, 4)),
        _both("kmeans", KMeans(), calibrated=True),
        _both("kmeans_rotated", Rotated(KMeans()), calibrated=True),
        _both("kmeans_center_rotated", Centered(Rotated(KMeans())), calibrated=True),
        _both("hessian", HessianAware(), calibrated=True),
        _both("hessian_rotated", Rotated(HessianAware()), calibrated=True),
        _both("hessian_center_rotated", Centered(Rotated(HessianAware())), calibrated=True),
        _both("svd_bf16", LowRank(Coded("bf16"), 17 / 64), calibrated=True),
        _both("svd_int8", LowRank(Coded("int8"), 1 / 2), calibrated=True),
        _both("lloyd_max", Rotated(LloydMax(), signs=True)),
        _both("lloyd_max_center", Centered(Rotated(LloydMax(), signs=True)), calibrated=True),
        _both("q4_0_rotated", Rotated(Q40())),
        Method("channel_keys_g64", Grouped(by_channel=True), Grouped(by_channel=False)),
        _KVARN,
        replace(_KVARN, name="kvarn", kept=KVARN_KEPT),
        _prepared("prepared_int3_kept_as_kvarn", "int3", KVARN_KEPT),
        _prepared("prepared_int4v2_kept_as_kvarn", "int4v2", KVARN_KEPT),
        _OSCAR,
        replace(_OSCAR, name="oscar", kept=OSCAR_KEPT),
        _prepared("prepared_int2_kept_as_oscar", "int2", OSCAR_KEPT),
    )
}


def find_method(name: str) -> Method:
    """The method called `name`, or the cache format of that name as a method: `int3-r64`, or `prepared_int3-r64`.

    Raises:
        FormatError: `name` is neither.
    """
    if name in METHODS:
        return METHODS[name]
    try:
        own = CacheFormat.parse(name.removeprefix("prepared_"))
    except FormatError as error:
        raise FormatError(
            "--formats: expected cache formats such as int4-k128-v128, and methods that `sawkv formats` lists; got"
            f" {name!r}"
        ) from error
    if not name.startswith("prepared_"):
        return served_format(own)
    if not own.quantized:
        raise FormatError(
            f"--formats: expected a quantized format after prepared_, such as prepared_int4, got {name}, for which"
            f" there is nothing to fit: take {own}"
        )
    return replace(_prepared(name, own.codec, _recent(own)), served="sawkv", format=own)


def check_fits(method: Method, head_dim: int) -> None:
    """Refuse a cache format that does not fit the model's heads, before minutes of work.

    Raises:
        FormatError: its rotation order does not divide head_dim.
    """
    if method.format is None:
        return
    try:
        method.format.resolve(head_dim)
    except FormatError as error:
        way_out = (
            "" if method.format.k_rotation_order is None else f"; {method.format.codec} takes the rotation that fits"
        )
        raise FormatError(f"{method.name} does not fit this model: {error}{way_out}") from error


def fit(method: Method, samples: Sequence[LayerSample]) -> list[LayerReaders]:
    """What `EvalModel.reading` takes for each layer."""
    if method.kept is None:
        return [method.fit(sample) for sample in samples]
    return [(*method.fit(sample), method.kept) for sample in samples]


__all__ = ["METHODS", "Method", "check_fits", "find_method", "fit", "served_format"]
