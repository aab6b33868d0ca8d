"""`fl-adapters bundle run DIR [ARGUMENTS]`, and `python -m fl_adapters.monai run DIR [ARGUMENTS]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import fire
from monai.bundle import ConfigParser

from fl_adapters.participant.kit import KIT_VARIABLE
from fl_runtime.errors import ConfigError, FederationError

from .bundle import workflow_of


def run(
    bundle: str,
    run_id: str | None = None,
    init_id: str | None = None,
    final_id: str | None = None,
    meta_file: Any = None,
    config_file: Any = None,
    logging_file: Any = None,
    tracking: Any = None,
    args_file: str | None = None,
    trainer_id: str | None = None,
    kit: str | None = None,
    **override: Any,
) -> None:
    """Run the bundle in folder BUNDLE, unmodified, as a participant of a federation; without a startup kit, alone.

    The arguments are those of `python -m monai.bundle run`: --id VALUE overrides a part of the configuration. Besides
    these:

    Args:
        bundle: the bundle's folder, or one of its configurations. By default configs/train.json, .yaml or .yml.
        run_id: what to run. By default "run", else "training".
        trainer_id: the bundle's trainer. By default "train#trainer", else "trainer".
        kit: folder of the site's startup kit; by default $FL_ADAPTERS_KIT.
        override: --federated_handler#every 2 and the like are arguments of FederatedHandler. In expressions,
            @federated_site has the name, index and count of this site: --dataset_dir '$"data/" + @federated_site.name'
    """
    if kit is not None:
        os.environ[KIT_VARIABLE] = kit
    given = {"run_id": run_id, "init_id": init_id, "final_id": final_id, "meta_file": meta_file}
    given |= {"config_file": config_file, "logging_file": logging_file, "tracking": tracking, "trainer_id": trainer_id}
    defaults = ConfigParser.load_config_file(args_file) if args_file else {}
    for name in given:
        value = defaults.pop(name, None)
        given[name] = given[name] if given[name] is not None else value
    if not Path(bundle).exists():
        raise ConfigError("there is no such bundle", where=bundle, fix="check the path")
    try:
        workflow = workflow_of(Path(bundle), {**defaults, **override}, **given)
        workflow.initialize()
        workflow.run()
        workflow.finalize()
    except RuntimeError as error:  # what MONAI makes of an error in an expression
        ours = _ours_within(error)
        if ours is None:
            raise
        raise ours from None


def _ours_within(error: BaseException) -> FederationError | None:
    """The error of the federation that brought about `error`, if it was one."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, FederationError):
        cause = cause.__cause__
    return cause


def main() -> None:
    """Exits with status 1, and a message without a traceback, where the federation or the bundle is at fault."""
    try:
        fire.Fire({"run": run}, name="fl-adapters bundle")
    except FederationError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
