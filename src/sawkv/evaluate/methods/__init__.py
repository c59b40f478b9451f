"""Ways of storing K and V, all through one interface (`base`), one file each. `find_method` takes a name; `METHODS` lists them.

Any cache format of the product is a method too, by its own name: `int4-k64-v0`.
"""

from __future__ import annotations

from sawkv.errors import FormatError
from sawkv.evaluate.methods.base import LayerSample, Method, Quantizer, Reader, Sample
from sawkv.evaluate.methods.centered import Centered
from sawkv.evaluate.methods.integer import Coded
from sawkv.evaluate.methods.rotated import Rotated
from sawkv.spec import CacheFormat


def served_format(cache_format: CacheFormat, name: str | None = None) -> Method:
    """The method that a cache format of the product is."""
    code = Coded(cache_format.codec)
    rotates = cache_format.quantized or cache_format.k_rotation_order is not None
    k, v = (
        Rotated(code, order) if rotates and order != 0 else code for order in (cache_format.k_rotation_order, cache_format.v_rotation_order)
    )
    return Method(name or str(cache_format), k, v, served="sawkv")


def _both(name: str, quantizer: Quantizer, *, calibrated: bool = False, served: str = "") -> Method:
    return Method(name, quantizer, quantizer, calibrated, served)


_ROTATED = Rotated(Coded("int4"))

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        _both("default", Centered(_ROTATED), calibrated=True, served="sawkv"),
        served_format(CacheFormat("int4", 0, 0), "int4_plain"),
        served_format(CacheFormat("int8", 0, 0), "int8_plain"),
        _both("int4_signs", Rotated(Coded("int4"), signs=True)),
        Method("int4_center_k", Centered(_ROTATED), _ROTATED, calibrated=True, served="sawkv"),
        Method("int4_center_v", _ROTATED, Centered(_ROTATED), calibrated=True, served="sawkv"),
    )
}


def find_method(name: str) -> Method:
    """The method of that name, or that the cache format of that name is.

    Raises:
        FormatError: it is neither.
    """
    if name in METHODS:
        return METHODS[name]
    try:
        return served_format(CacheFormat.parse(name))
    except FormatError as error:
        raise FormatError(
            f"method: expected a cache format such as int4-k128-v128, or one of {', '.join(METHODS)}; got {name!r}"
        ) from error


__all__ = ["METHODS", "LayerSample", "Method", "Quantizer", "Reader", "Sample", "find_method", "served_format"]
