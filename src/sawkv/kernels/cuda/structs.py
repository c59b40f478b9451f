"""Launch parameters: each struct is written once, in the device code, and read from there.

A declaration is a type, names, and a semicolon, on one line: `const float* center[2];`. Both sides follow C's
alignment; `tests/test_device_code.py` has the compiler compare every offset. A field that the device code lacks is an
AttributeError when the host sets it.
"""

from __future__ import annotations

import ctypes
import functools
import re
from typing import Any

from sawkv.kernels.cuda import runtime

SCALARS = {"int": ctypes.c_int32, "float": ctypes.c_float, "i64": ctypes.c_int64}
_DECLARATION = re.compile(r"(?:const )?(\w+)(\*?) (\w+(?:\[\d+\])?(?:, \w+(?:\[\d+\])?)*);")
_NAME = re.compile(r"(\w+)(?:\[(\d+)\])?")


@functools.cache
def read(source_file: str, name: str) -> Any:
    """A subclass of ctypes.Structure with the fields of `struct name` in `source_file` or a file that it includes.

    Arrays are set from tuples. No other attribute can be set.

    Raises:
        ValueError: there is no such struct, or a line of it is no declaration as above.
    """
    source = "\n".join(runtime.read_sources(source_file).values())
    found = re.search(rf"^struct {name} {{\n(.*?)^}};", source, re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError(f"{source_file}: expected a struct {name}")
    fields: list[tuple[str, Any]] = []
    for line in found[1].splitlines():
        code = line.partition("//")[0].strip()
        declaration = _DECLARATION.fullmatch(code)
        if declaration is None or not (declaration[2] or declaration[1] in SCALARS):
            raise ValueError(f"{source_file}, struct {name}: expected `type name, name[2];`, got {code!r}")
        kind: Any = ctypes.c_void_p if declaration[2] else SCALARS[declaration[1]]
        for field, count in _NAME.findall(declaration[3]):
            fields.append((field, kind * int(count) if count else kind))
    return type(name, (ctypes.Structure,), {"_fields_": fields, "__slots__": ()})
