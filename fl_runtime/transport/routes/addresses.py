"""The addresses at which the server may be, and the one that is tried next."""

from __future__ import annotations

from collections.abc import Sequence

from fl_runtime.transport.routes.proxies import open_connection, proxy_of

_CONNECT_S = 2.0


class Addresses:
    """Addresses of servers that stand in for each other. One of them serves at a time. It is not thread-safe.

    Args:
        addresses: At least one "host:port"; one may be given as text.

    Attributes:
        current: The address that calls go to.

    Raises:
        ConfigError: If the environment does not name an HTTP proxy where it should.
    """

    def __init__(self, addresses: str | Sequence[str]) -> None:
        self._all = (addresses,) if isinstance(addresses, str) else tuple(addresses)
        self.current = self._all[0]
        for address in self._all:
            proxy_of(address)

    def __str__(self) -> str:
        return " or ".join(self._all)

    def look(self, *, elsewhere: bool) -> str:
        """Find an address where somebody accepts connections, and make it the current one.

        A single address is not tried. If nobody answers at any address, the call that follows reports it.

        Args:
            elsewhere: Try the current address last, since a connection to it was lost: a server that has been
                suspended accepts connections and answers none.

        Returns:
            The current address.
        """
        if len(self._all) > 1:
            begin = self._all.index(self.current) + elsewhere
            order = [*self._all[begin:], *self._all[:begin]]
            self.current = next(filter(_accepts, order), order[0])
        return self.current


def _accepts(address: str) -> bool:
    try:
        open_connection(address, _CONNECT_S).close()
    except OSError:
        return False
    return True
