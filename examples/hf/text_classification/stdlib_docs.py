"""Real labelled text that every machine has: the docstrings of Python's standard library, by subject area.

The sources are parsed, never imported, so nothing runs. The rows depend on the Python version alone.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

AREAS = {
    "network": "asynchat asyncore cgi ftplib http imaplib ipaddress nntplib poplib selectors smtpd smtplib socket "
    "socketserver ssl telnetlib urllib uuid webbrowser wsgiref xmlrpc",
    "mail": "email mailbox mailcap mimetypes quopri uu base64",
    "text": "codecs configparser csv difflib encodings gettext html json locale plistlib pprint re reprlib string "
    "textwrap tomllib xml _strptime argparse optparse cmd getopt shlex",
    "files": "bz2 compression dbm filecmp fileinput fnmatch genericpath glob gzip lzma ntpath os pathlib posixpath "
    "shelve shutil sqlite3 stat tarfile tempfile zipfile _pyio _compression io",
    "numbers": "_pydecimal bisect calendar colorsys datetime _pydatetime decimal fractions heapq hmac hashlib numbers random "
    "secrets statistics turtle zoneinfo",
    "language": "_collections_abc abc ast code codeop collections contextlib copy copyreg dataclasses dis enum "
    "functools importlib imp inspect operator pickle pickletools pkgutil py_compile pyclbr runpy symtable "
    "tokenize types typing weakref zipimport modulefinder compileall",
    "testing": "bdb cgitb cProfile doctest linecache logging pdb profile pstats timeit trace traceback tracemalloc "
    "unittest warnings",
    "parallel": "_threading_local asyncio concurrent contextvars multiprocessing queue sched signal subprocess "
    "threading graphlib",
}


def rows() -> Iterator[tuple[str, str]]:
    """(area, docstring) of every documented module, class and function of the areas, in a fixed order."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for area, names in AREAS.items():
        for name in sorted(names.split()):
            module, package = library / f"{name}.py", library / name
            for path in sorted([module, *package.rglob("*.py")]):
                if path.is_file() and not {"test", "tests"} & set(path.parts):
                    for text in docstrings(path):
                        yield area, text


def docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = " ".join((ast.get_docstring(node) or "").split())
            if len(text.split())>=4: yield text
if __name__=='__main__':
    import collections
    c=collections.Counter(); by={}; 
    R=list(rows()); print(len(R))
    for a,t in R: by.setdefault(t.lower(),set()).add(a)
    print(len(by), sum(len(v)>1 for v in by.values()))
    print(collections.Counter(next(iter(v)) for v in by.values() if len(v)==1))
