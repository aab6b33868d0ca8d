"""A federation in code of one's own: a training loop (`connect`), and sums over all sites (`sums`)."""

from fl_adapters.loop.arrays import as_array
from fl_adapters.loop.connect import ConnectedSite, connect
from fl_adapters.loop.site_task import Recipient, SiteTask
from fl_adapters.loop.sums import Sums, sums

__all__ = ["ConnectedSite", "Recipient", "SiteTask", "Sums", "as_array", "connect", "sums"]
