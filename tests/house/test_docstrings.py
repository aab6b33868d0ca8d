"""Docstrings say something: none is so short that it makes sense only beside the code."""

from __future__ import annotations

import ast

from source_tree import docstrings, python_files, shown, tree_of

LEAST_WORDS = 4


def test_no_docstring_is_a_riddle() -> None:
    faults = [
        f'{shown(path, line)} {name}: """{text}"""; write a sentence that makes sense alone, or delete it'
        for path in python_files("fl_runtime", "fl_adapters", "integrations", "examples", "benchmarks")
        for line, name, text in docstrings(tree_of(path))
        if len(text.split()) < LEAST_WORDS
    ]
    assert not faults, "\n".join(faults)


def test_every_kind_of_docstring_is_read() -> None:
    text = '"""A."""\nX = 1\n"""B."""\nclass C:\n    """C."""\n    y: int\n    """D."""\n    def f():\n        """E."""'
    assert sorted(words for _, _, words in docstrings(ast.parse(text))) == ["A.", "B.", "C.", "D.", "E."]
