"""What a bundle's metadata says its channels mean, which sites must have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fl_runtime.wire.names import ordered

_META = "_meta_"  # where MONAI's parser keeps metadata.json


def channels_of(parser: Any) -> dict[str, list[str]]:
    """Return the definitions of channels, by what they are.

    Args:
        parser: A bundle's ConfigParser, which may have read metadata with `network_data_format`, as MONAI's schema has
            it.

    Returns:
        "channels of the output 'pred'" -> their names, such as "background" and "spleen".
    """
    metadata = parser.get(_META)
    formats = metadata.get("network_data_format") if isinstance(metadata, Mapping) else None
    found = {}
    for side in ("inputs", "outputs"):
        described = formats.get(side) if isinstance(formats, Mapping) else None
        for name, tensor in described.items() if isinstance(described, Mapping) else ():
            if isinstance(tensor, Mapping) and (entries := ordered(tensor.get("channel_def"))):
                found[f"channels of the {side[:-1]} {name!r}"] = entries
    return found
