"""What a site's policy says about the small files that a model needs beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class FilesPolicy:
    """The rules of a policy on files such as config.json and tokenizers, which go to the server with the final model.

    Attributes:
        share: Name patterns (`fnmatch`) of the files that may leave the site.
        names: Whether entries of lists, such as labels, may leave. The files hold them.
        max_bytes: Largest size of all files together; None does not limit it.
    """

    share: tuple[str, ...]
    names: bool
    max_bytes: int | None

    def kept_back(self, sizes: Mapping[str, int]) -> dict[str, str]:
        """Return which files may not leave.

        Args:
            sizes: Name of each file -> its size in bytes.

        Returns:
            Name of each file that stays -> the rule that keeps it, as the policy file has it.
        """
        if not self.names:
            return dict.fromkeys(sizes, "names: false")
        rule = f"share_files: [{', '.join(self.share)}]" if self.share else "no share_files: true"
        kept = {name: rule for name in sizes if not any(fnmatchcase(name, pattern) for pattern in self.share)}
        total = sum(size for name, size in sizes.items() if name not in kept)
        if self.max_bytes is not None and total > self.max_bytes:
            return {**dict.fromkeys(sizes, f"max_round_bytes: {self.max_bytes}"), **kept}
        return kept
