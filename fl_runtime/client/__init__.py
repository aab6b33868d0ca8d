"""The site's side of the protocol: join, register, receive tasks, submit updates, report scores, leave."""

from __future__ import annotations

from fl_runtime.client.site_client import FilesReceipt, SiteClient, Welcome

__all__ = ["FilesReceipt", "SiteClient", "Welcome"]
