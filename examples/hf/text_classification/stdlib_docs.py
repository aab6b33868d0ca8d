"""Real labelled text that every machine has: docstrings of Python's standard library, by subject area.

The sources are parsed and never imported, so none of their code runs. The rows depend only on the version of Python.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Modules that every distribution of Python ships. Some exist only in some versions of Python.
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
    """Pairs (area, docstring) of every documented module, class and function."""
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
    """The module, its classes and functions. Expressions are skipped, since they hold most nodes of a tree."""
    if isinstance(node, Documented):
        yield node
    for block in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, block, ()):
            if isinstance(child, ast.stmt | ast.excepthandler):
                yield from _definitions(child)
