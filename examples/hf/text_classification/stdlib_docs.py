"""Real labelled text that is on every machine: docstrings of Python's standard library, by subject area.

The sources are parsed and never imported, so nothing runs. The rows depend on the version of Python alone.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Only modules that every distribution of Python ships; some of them exist in some versions alone.
AREAS = {
    "network": "asynchat asyncore cgi ftplib http imaplib ipaddress nntplib poplib selectors smtpd smtplib socket"
    " socketserver ssl telnetlib urllib uuid webbrowser wsgiref xmlrpc",
    "mail": "base64 email mailbox mailcap mimetypes quopri uu",
    "text": "_strptime argparse cmd codecs configparser csv difflib getopt gettext html json locale optparse plistlib"
    " pprint re reprlib shlex string textwrap tomllib xml",
    "files": "_compression _pyio bz2 compression dbm filecmp fileinput fnmatch genericpath glob gzip io lzma ntpath os"
    " pathlib posixpath shelve shutil sqlite3 stat tarfile tempfile zipfile",
    "numbers": "_pydatetime _pydecimal bisect calendar colorsys datetime decimal fractions hashlib heapq hmac numbers"
    " random secrets statistics turtle zoneinfo",
    "language": "_collections_abc abc ast code codeop collections compileall contextlib copy copyreg dataclasses dis"
    " enum functools imp importlib inspect modulefinder operator pickle pickletools pkgutil py_compile pyclbr"
    " runpy symtable tokenize types typing weakref zipimport",
    "testing": "bdb cProfile cgitb doctest linecache logging pdb profile pstats timeit trace traceback tracemalloc"
    " unittest warnings",
    "parallel": "_threading_local asyncio concurrent contextvars graphlib multiprocessing queue sched signal subprocess"
    " threading",
}
MIN_WORDS = 4


def rows() -> Iterator[tuple[str, str]]:
    """(area, docstring) of every documented module, class and function of the areas."""
    library = Path(sysconfig.get_path("stdlib"))
    for area, modules in AREAS.items():
        for module in modules.split():
            for path in (library / f"{module}.py", *(library / module).rglob("*.py")):
                if path.is_file() and not {"test", "tests"} & set(path.relative_to(library).parts):
                    yield from ((area, text) for text in _docstrings(path))


def _docstrings(path: Path) -> Iterator[str]:
    for node in _definitions(ast.parse(path.read_bytes())):
        text = " ".join((ast.get_docstring(node) or "").split())
        if len(text.split()) >= MIN_WORDS:
            yield text


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(node: ast.AST) -> Iterator[Documented]:
    """The module, classes and functions; expressions, most of any source, are not walked."""
    if isinstance(node, Documented):
        yield node
    for block in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, block, ()):
            if isinstance(child, ast.stmt | ast.excepthandler):
                yield from _definitions(child)
