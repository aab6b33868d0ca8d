"""Where the server is, and the way to it: addresses, proxies, and the certificate at the other end."""
