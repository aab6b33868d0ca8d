"""Command line for bundles: `fl-adapters bundle run DIR`, and `python -m fl_adapters.monai run DIR`."""

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
    """Run an unmodified bundle as a participant of a federation. Without a startup kit it runs alone.

    The arguments are those of `python -m monai.bundle run`, and a few more. --id VALUE overrides a part of the
    configuration.

    Args:
        bundle: Folder of the bundle, or one of its configurations. In a folder: configs/train.json, .yaml or .yml.
        run_id: Id of what to run. Default: "run", else "training".
        init_id: Id of what to run before it. Default: MONAI's.
        final_id: Id of what to run after it. Default: MONAI's.
        meta_file: Metadata of the bundle. Default: MONAI's.
        config_file: Configuration to use instead, a file or a list of files.
        logging_file: Configuration of Python's logging. Default: MONAI's.
        tracking: Settings of an experiment tracker, as MONAI takes them.
        args_file: File with default values for all these arguments.
        trainer_id: Id of the bundle's trainer. Default: "train#trainer", else "trainer".
        kit: Folder of this site's startup kit. Default: $FL_ADAPTERS_KIT.
        **override: Other parts of the configuration. --federated_handler#every 2 and the like are arguments of
            FederatedHandler. In expressions, @federated_site has the name, index and count of this site:
            --dataset_dir '$"data/" + @federated_site.name'
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
    except RuntimeError as error:  # MONAI wraps errors in expressions
        ours = _ours_within(error)
        if ours is None:
            raise
        raise ours from None


def _ours_within(error: BaseException) -> FederationError | None:
    """The FederationError that caused `error`, or None if another error did."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, FederationError):
        cause = cause.__cause__
    return cause


def main() -> None:
    """Run the command. A FederationError is printed without a traceback, and the exit status is 1."""
    try:
        fire.Fire({"run": run}, name="fl-adapters bundle")
    except FederationError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
