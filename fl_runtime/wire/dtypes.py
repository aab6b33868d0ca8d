"""The supported element types: canonical names, NumPy dtypes, and safetensors codes.

The canonical name is that of NumPy or `ml_dtypes` ("float32", "bfloat16", "float8_e4m3fn"). Manifests use these names.
"""

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
    """Return the canonical name of a dtype; the byte order does not matter.

    Args:
        dtype: The dtype of an array.
        tensor: Name of the tensor, for the error message.

    Returns:
        One of the keys of `DTYPES`.

    Raises:
        ConfigError: If arrays of this dtype cannot be sent.
    """
    name = _NAMES.get(dtype.newbyteorder("<"))
    if name is None:
        raise ConfigError(
            f"tensor {tensor!r} has dtype {dtype}, which cannot be sent",
            fix=f"convert it to one of {', '.join(DTYPES)}, or keep it at the site with keep_local=[{tensor!r}]",
        )
    return name


def dtype_of(name: str) -> np.dtype[Any]:
    """Return the little-endian NumPy dtype of a canonical name.

    Args:
        name: A canonical name, usually read from a manifest.

    Returns:
        The dtype, little endian on every machine.

    Raises:
        ProtocolError: If this version does not know the name.
    """
    try:
        return DTYPES[name]
    except KeyError:
        raise ProtocolError(
            f"unknown dtype {name!r}", fix="upgrade fl-adapters on the side with the older version"
        ) from None


def safetensors_code(name: str) -> str:
    """Return the safetensors code of a canonical name: "F32" for "float32"."""
    return _CODES[name]


def name_from_safetensors(code: str) -> str | None:
    """Return the canonical name of a safetensors code, or None if the code is not supported."""
    return _FROM_CODE.get(code)
