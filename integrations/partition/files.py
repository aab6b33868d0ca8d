"""Writes the part of a site into a file that the site's script reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fl_runtime.errors import ConfigError


def write_part(part: Any, path: Path) -> None:
    """Write the data of a site. The folder of the file is made.

    Args:
        part: Data of one site.
        path: The file; its ending says the format. Of a data set of `datasets`, the folder.

    Raises:
        ConfigError: Data of this type cannot be such a file.
    """
    ending = path.suffix.lower()
    path.parent.mkdir(parents=True, exist_ok=True)
    if hasattr(part, "iloc") and ending in (".csv", ".parquet"):
        part.to_csv(path, index=False) if ending == ".csv" else part.to_parquet(path, index=False)
    elif hasattr(part, "save_to_disk") and not ending:
        part.save_to_disk(str(path))
    elif isinstance(part, tuple) and ending == ".npz":
        np.savez(path, *map(_plain, part))
    elif hasattr(part, "shape") and not hasattr(part, "iloc") and ending == ".npy":
        np.save(path, _plain(part), allow_pickle=False)
    elif hasattr(part, "shape") and not hasattr(part, "iloc") and ending == ".csv" and len(part.shape) <= 2:
        np.savetxt(path, _plain(part), delimiter=",", fmt="%s")
    else:
        raise ConfigError(
            f"{type(part).__name__} cannot be written to {path.name}",
            where="write",
            fix="pandas: .csv or .parquet; an array: .npy or .csv; a tuple of arrays: .npz; `datasets`: a folder. "
            "Other data: divide them in the script, with mine()",
        )


def _plain(array: Any) -> Any:
    """The array as one of NumPy. Raises ConfigError for one of Python objects, which NumPy would pickle."""
    found = np.asarray(array.detach().cpu() if hasattr(array, "detach") else array)
    if found.dtype.hasobject:
        fix = "convert it to numbers or fixed-width texts, such as array.astype(str)"
        raise ConfigError("an array of Python objects cannot be written", where="write", fix=fix)
    return found
