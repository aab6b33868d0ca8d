"""The contract of a section: a group of pages about one subject, with an entry in the dashboard's navigation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from starlette.routing import Route


class Section(Protocol):
    """A group of pages.

    Pages are made by `fl_adapters.dashboard.page.page`. What a reader should see change carries `live` regions; the
    browser asks for a page again when `version` returns another text for its path.
    """

    @property
    def title(self) -> str:
        """Its name in the navigation."""
        ...

    @property
    def path(self) -> str:
        """Path of its first page, such as "/runs". All its pages lie below."""
        ...

    def routes(self) -> Sequence[Route]:
        """Return its routes. Endpoints that are plain functions run in threads, so they may read files and wait."""
        ...

    def version(self, path: str) -> str:
        """Return a text that changes when the page at a path would look different.

        Called five times a second for every page that is open, in a thread, so it has to be cheap.

        Args:
            path: Path and query of a page of this section, as the browser names it. It may be anything.

        Returns:
            The text; "" for a page that never changes, or that is not there.
        """
        ...

    def close(self) -> None:
        """Free what the section holds, such as a connection. Called once, at the end."""
        ...
