"""Name patterns that choose which tensors travel."""

from __future__ import annotations

import pytest

from fl_adapters.participant.exchange import matches, selected
from fl_runtime.errors import ConfigError

NAMES = ["body.0.weight", "body.0.bias", "norm.weight", "norm.running_mean", "head.weight"]


def test_words_admit_every_name_in_order() -> None:
    for word in ("auto", "trainable", "all"):
        assert selected(NAMES, word, ()) == NAMES


@pytest.mark.parametrize(
    ("exchange", "keep_local", "wanted"),
    [
        (("body.*",), (), ["body.0.weight", "body.0.bias"]),
        (("*.weight",), (), ["body.0.weight", "norm.weight", "head.weight"]),
        (("head.weight", "body.*"), (), ["body.0.weight", "body.0.bias", "head.weight"]),
        (("body.[0-3].*",), (), ["body.0.weight", "body.0.bias"]),
        (("?ead.*",), (), ["head.weight"]),
        ("auto", ("norm.*",), ["body.0.weight", "body.0.bias", "head.weight"]),
        (("*.weight",), ("head.*", "norm.*"), ["body.0.weight"]),
    ],
)
def test_patterns_choose_and_keep_local_takes_away(
    exchange: str | tuple[str, ...], keep_local: tuple[str, ...], wanted: list[str]
) -> None:
    assert selected(NAMES, exchange, keep_local) == wanted


def test_case_matters() -> None:
    assert not matches("Head.weight", ["head.*"])


@pytest.mark.parametrize(
    ("exchange", "keep_local", "argument"), [(("haed.*",), (), "exchange"), ("auto", ("haed.*",), "keep_local")]
)
def test_a_pattern_that_matches_nothing_is_a_typing_error(
    exchange: str | tuple[str, ...], keep_local: tuple[str, ...], argument: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{argument}: the pattern 'haed\.\*'") as caught:
        selected(NAMES, exchange, keep_local)
    assert "body.0.weight" in caught.value.fix


@pytest.mark.parametrize(("exchange", "keep_local"), [("auto", ("*",)), (("head.*",), ("head.*",)), ((), ())])
def test_nothing_left_is_refused(exchange: str | tuple[str, ...], keep_local: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="no tensor is left to exchange"):
        selected(NAMES, exchange, keep_local)
