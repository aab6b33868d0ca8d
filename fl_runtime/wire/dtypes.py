"""The element types that travel, by one canonical name each, and their safetensors codes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from fl_runtime.errors import ConfigError, ProtocolError

_CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(getattr(ml_dtypes, name, None) or name).newbyteorder("<") for name in _CODES
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FROM_CODE = {code: name for name, code in _CODES.items()}


def dtype_name(dtype: np.dtype[Any], *, tensor: str) -> str:
    """Canonical name of a dtype, whatever its byte order; ConfigError if it cannot travel."""
    name = _NAMES.get(dtype.newbyteorder("<"))
    if name is None:
        raise ConfigError(
            f"tensor {tensor!r} has dtype {dtype}, which cannot travel",
            fix=f"convert it to one of {', '.join(DTYPES)}, or keep it at the site with keep_local=[{tensor!r}]",
        )
    return name


def dtype_of(name: str) -> np.dtype[Any]:
    """The NumPy dtype (little endian) of a canonical name; ProtocolError if unknown."""
    try:
        return DTYPES[name]
    except KeyError:
        raise ProtocolError(f"unknown dtype {name!r}", fix="upgrade the older of the two sides") from None


def safetensors_code(name: str) -> str:
    return _CODES[name]


def name_from_safetensors(code: str) -> str | None:
    return _FROM_CODE.get(code)
