"""The arguments shared by all adapters: what is accepted, what is refused, and which source takes precedence."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from fl_adapters.participant.options import Every, Options, SiteSettings
from fl_runtime.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "every"),
    [
        ("epoch", Every(epochs=1)),
        ("1 epoch", Every(epochs=1)),
        ("2 epochs", Every(epochs=2)),
        (" 3  epochs ", Every(epochs=3)),
        ("10epochs", Every(epochs=10)),
        (50, Every(steps=50)),
        ("50", Every(steps=50)),
        ("50 steps", Every(steps=50)),
        ("1 step", Every(steps=1)),
        (np.int64(7), Every(steps=7)),
    ],
)
def test_budgets(value: Any, every: Every) -> None:
    assert Every.parse(value) == every
    assert Every.parse(str(every)) == every


@pytest.mark.parametrize(
    "value",
    ["", "epochs", "steps", "two epochs", "1.5 epochs", 0, "0", "0 epochs", -1, 1.5, True, "epoch 2", "5 minutes"],
)
def test_what_is_no_budget_is_refused_with_examples(value: Any) -> None:
    with pytest.raises(ConfigError, match="every=") as caught:
        Options(every=value)
    assert "2 epochs" in caught.value.fix


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"exchange": "everything"}, "exchange='everything'"),
        ({"exchange": "head.*"}, "exchange='head.*'"),
        ({"exchange": [1, 2]}, "exchange=[1, 2]"),
        ({"exchange": 5}, "exchange=5"),
        ({"exchange": True}, "exchange=True"),
        ({"keep_local": "head.*"}, "keep_local='head.*'"),
        ({"keep_local": [None]}, "keep_local=[None]"),
        ({"keep_local": 5}, "keep_local=5"),
        ({"keep_local": None}, "keep_local=None"),
        ({"optimizer_state": "zero"}, "optimizer_state='zero'"),
        ({"optimizer_state": True}, "optimizer_state=True"),
        ({"num_examples": 0}, "num_examples=0"),
        ({"num_examples": -5}, "num_examples=-5"),
        ({"num_examples": 2.5}, "num_examples=2.5"),
        ({"num_examples": True}, "num_examples=True"),
    ],
)
def test_bad_arguments_are_named_with_what_to_write(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Options(**arguments)
    assert named in caught.value.what
    assert caught.value.fix


def test_the_known_choices_are_listed() -> None:
    for arguments, choices in (
        ({"exchange": "x"}, ("auto", "trainable", "all")),
        ({"optimizer_state": "x"}, ("keep", "reset", "average")),
    ):
        with pytest.raises(ConfigError) as caught:
            Options(**arguments)  # type: ignore[arg-type]
        assert all(choice in caught.value.fix for choice in choices)


def test_arguments_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        Options("kit")  # type: ignore[call-arg]


def test_num_examples_may_be_any_whole_number_type() -> None:
    assert Options(num_examples=np.int64(3)).num_examples == 3  # type: ignore[arg-type]


JOB = {
    "rounds": 4,
    "every": "2 epochs",
    "exchange": ["body.*"],
    "keep_local": ["body.norm.*"],
    "optimizer_state": "reset",
    "seed": 3,
    "best_metric": "accuracy",
    "best_mode": "max",
}


def test_the_default_holds_where_nobody_says_anything() -> None:
    settings = SiteSettings.resolve(Options(), {})
    assert settings == SiteSettings(None, Every(epochs=1), "auto", (), "keep", None, None, None, None)


def test_the_job_beats_the_default() -> None:
    assert SiteSettings.resolve(Options(), JOB) == SiteSettings(
        4, Every(epochs=2), ("body.*",), ("body.norm.*",), "reset", None, 3, "accuracy", "max"
    )


def test_the_script_beats_the_job() -> None:
    mine = Options(every=5, exchange="all", optimizer_state="keep", evaluate_global=False)
    settings = SiteSettings.resolve(mine, JOB)
    assert (settings.every, settings.exchange, settings.optimizer_state) == (Every(steps=5), "all", "keep")
    assert settings.evaluate_global is False
    assert settings.rounds == 4


def test_what_stays_at_home_adds_up() -> None:
    """Neither the script nor the job can remove a name from the other's list."""
    assert SiteSettings.resolve(Options(keep_local=["head.*"]), JOB).keep_local == ("head.*", "body.norm.*")


@pytest.mark.parametrize("job", [{}, JOB])
def test_settings_survive_json(job: dict[str, Any]) -> None:
    settings = SiteSettings.resolve(Options(every=5) if job else Options(), job)
    assert SiteSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
