"""What a command describes: a file that is read chunk by chunk, images, or what a function returns."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import fl_adapters
from fl_adapters.extras import needs_extra
from fl_runtime.errors import ConfigError

_ROWS_A_CHUNK = 100_000
_SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": None}
_PACKED = (".gz", ".bz2", ".xz", ".zip", ".zst")
_IMAGES = (".npy", ".nii", ".nii.gz", ".dcm", ".dicom", ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
_WHERE = "stats"


def open_source(source: str, categorical: Sequence[str] = ()) -> Any:
    """Return the table that a source names.

    Args:
        source: Path of a file (CSV, TSV, Parquet, Feather), or a function: `script.py:table` or `package.module:table`.
            It is called without arguments, or with `fl_adapters.site()` if it has a parameter.
        categorical: Names of columns whose numbers are read as texts.

    Returns:
        What `describe` takes: a data frame, or an iterable of such frames.

    Raises:
        ConfigError: There is no such file or function, or what reads it is not installed.
    """
    if called := _function_of(source):
        return _call(called)
    path = Path(source)
    if not path.is_file():
        raise ConfigError(
            f"there is no file {source}",
            where=_WHERE,
            fix="check the path; a function is script.py:NAME or module:NAME",
        )
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in _PACKED]
    kind = suffixes[-1] if suffixes else ""
    if kind in _SEPARATORS:
        return _texts(path, _SEPARATORS[kind], categorical)
    if kind in (".parquet", ".pq"):
        return _parquet(path)
    if kind in (".feather", ".arrow"):
        with needs_extra("statistics", "pyarrow", also=" pyarrow"):
            import pyarrow.feather
        return pyarrow.feather.read_table(path)
    raise ConfigError(
        f"{source} is no file of a known kind",
        where=_WHERE,
        fix="give .csv, .tsv, .parquet or .feather, or a function that reads it: script.py:NAME",
    )


def open_images(source: str) -> Any:
    """Return the images that a source names.

    Args:
        source: Path of an image, of a folder, whose images and those of its folders are meant, or a pattern of paths
            such as `scans/*.nii.gz`; or a function as in `open_source`.

    Returns:
        What `describe_images` takes: paths in order, or what the function returns.

    Raises:
        ConfigError: There is no such image or function.
    """
    if called := _function_of(source):
        return _call(called)
    place = Path(source)
    if place.is_file():
        return [place]
    if place.is_dir():
        inside = (path for path in place.rglob("*") if path.is_file() and path.name.lower().endswith(_IMAGES))
        found = sorted(path for path in inside if not path.name.startswith("."))
    else:
        found = sorted(path for path in map(Path, glob(source, recursive=True)) if path.is_file())
    if not found:
        raise ConfigError(
            f"there is no image in {source}",
            where=_WHERE,
            fix=f"name a folder of files with the endings {', '.join(_IMAGES)}; or a pattern, with other endings too",
        )
    return found


def _function_of(source: str) -> Callable[..., Any] | None:
    """The function that a source names; None for a path."""
    place, _, name = source.rpartition(":")
    if place and name.isidentifier() and not Path(source).exists():
        return _function(place, name)
    return None


def _texts(path: Path, separator: str | None, categorical: Sequence[str]) -> Iterator[Any]:
    with needs_extra("statistics", "pandas", also=" pandas"):
        import pandas
    dtypes = dict.fromkeys(categorical, str)
    engine: Any = None if separator else "python"
    try:
        with pandas.read_csv(path, sep=separator, dtype=dtypes, engine=engine, chunksize=_ROWS_A_CHUNK) as chunks:
            yield from chunks
    except (ValueError, UnicodeError, OSError) as error:  # pandas' own are kinds of ValueError
        raise ConfigError(f"{path} cannot be read: {error}", where=_WHERE, fix="check the file") from None


def _parquet(path: Path) -> Iterator[Any]:
    with needs_extra("statistics", "pyarrow", also=" pyarrow"):
        import pyarrow
        import pyarrow.parquet
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=_ROWS_A_CHUNK)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", where=_WHERE, fix="check the file") from None


def _function(place: str, name: str) -> Callable[..., Any]:
    module = _script(Path(place)) if place.endswith(".py") else _module(place)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(
            f"{place} has no function {name}", where=_WHERE, fix="name a function that returns a data frame"
        )
    return function


def _script(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"there is no script {path}", where=_WHERE, fix="check the path")
    sys.path.insert(0, str(path.parent.resolve()))  # as when the script is run
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # a path that ends with .py has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _module(name: str) -> Any:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        raise ConfigError(
            f"there is no module {name}", where=_WHERE, fix="check the name; a script ends with .py"
        ) from None


def _call(function: Callable[..., Any]) -> Any:
    needed = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return function(fl_adapters.site()) if needed else function()
