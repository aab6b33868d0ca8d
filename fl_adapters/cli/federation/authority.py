"""Commands `fl-adapters authority ...`: the passphrase of the authority's key."""

from __future__ import annotations

from pathlib import Path

from fl_adapters.cli.federation.passphrase import fresh, present
from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_adapters.extras import needs_trust_extra


def passphrase(folder: Path, file: Path | None, new_file: Path | None, remove: bool, as_json: bool) -> int:
    """Set, change or remove the passphrase of the authority's key."""
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.errors import ConfigError
        from fl_runtime.trust.authority import Authority
        from fl_runtime.trust.passphrase import change

        if remove and new_file is not None:
            raise ConfigError("--remove and --new-file exclude each other", fix="pass one of them")
        authority = Authority(folder)
        change(folder, present(file), b"" if remove else fresh(new_file))
        text = "its key has no passphrase any more" if remove else "its key has the new passphrase"
        console_for(as_json).print(f"{folder}: {text}", highlight=False, soft_wrap=True)
        if as_json:
            show_json({"authority": authority.fingerprint, "encrypted": not remove})
    return 0
