"""A command's connection to the server of its federation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from fl_runtime.client.control import ControlClient
from fl_runtime.errors import ProtocolError, StoreError

if TYPE_CHECKING:
    from fl_runtime.trust.kits import StartupKit


@contextmanager
def connected(kit: StartupKit) -> Iterator[ControlClient]:
    """Connect with a kit's certificate for the block, after taking up a new root of the authority if there is one.

    Args:
        kit: The kit of an admin or a site.

    Yields:
        The connection.

    Raises:
        FederationError: The server is out of reach, or refuses the kit.
    """
    from fl_runtime.client.kit_transport import KitTransport
    from fl_runtime.client.roots import take_up_new_roots

    transport = KitTransport(kit.folder, kit.addresses)
    with closing(ControlClient(transport)) as control:
        try:
            if take_up_new_roots(kit.folder, transport):
                print(f"a new root of the authority was taken up in {kit.folder}", file=sys.stderr, flush=True)
        except ProtocolError:
            pass  # the server is of a version that does not know of new roots
        except StoreError as error:
            print(f"a new root of the authority cannot be taken up: {error}", file=sys.stderr, flush=True)
        yield control
