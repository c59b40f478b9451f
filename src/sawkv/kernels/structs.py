"""Arguments of compiled kernels: each struct is written once, in C++, and read from there.

A declaration is a type, names and a semicolon on one line: `const float* center;`, `int32_t dtype, num_threads;`. Both
sides follow C's alignment. A field that C++ lacks is an AttributeError when Python sets it.
"""

from __future__ import annotations

import ctypes
import functools
import re
from typing import Any

_SCALARS = {
    "int": ctypes.c_int32,
    "int32_t": ctypes.c_int32,
    "float": ctypes.c_float,
    "i64": ctypes.c_int64,
    "int64_t": ctypes.c_int64,
}
_NAME = re.compile(r"(\w+)(?:\[(\d+)\])?")
_NAMES = rf"{_NAME.pattern}(?:, {_NAME.pattern})*"
_POINTER = re.compile(rf"(?:const )?\w+\* ({_NAME.pattern});")
_VALUES = re.compile(rf"(\w+) ({_NAMES});")


@functools.cache
def read(source: str, name: str) -> Any:
    """A subclass of `ctypes.Structure` with the fields of `struct name`.

    Args:
        source: C++ text. Structs that are fields of others are looked up in it too.
        name: the struct's.

    Returns:
        A class. Array fields are set from tuples. No attribute can be set but its fields.

    Raises:
        ValueError: there is no such struct, or a line of it is no declaration as above.
    """
    found = re.search(rf"^struct {name} {{\n(.*?)^}};", source, re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError(f"expected a struct {name}, got none")
    fields: list[tuple[str, Any]] = []
    for line in found[1].splitlines():
        code = line.partition("//")[0].strip()
        pointer, values = _POINTER.fullmatch(code), _VALUES.fullmatch(code)
        kind: Any = ctypes.c_void_p
        if pointer is not None:
            names = pointer[1]
        elif values is not None:
            kind, names = _SCALARS.get(values[1]) or read(source, values[1]), values[2]
        else:
            raise ValueError(f"struct {name}: expected `type name, name[2];`, got {code!r}")
        fields += [(field, kind * int(count) if count else kind) for field, count in _NAME.findall(names)]
    return type(name, (ctypes.Structure,), {"_fields_": fields, "__slots__": ()})
