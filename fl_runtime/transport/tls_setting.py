"""The TLS setting of gRPC that must be made before gRPC is loaded."""

from __future__ import annotations

import os


def only_tls_1_3() -> None:
    """Exclude TLS 1.2 from the gRPC servers of this process. Call it before gRPC is loaded, in server processes only.

    The only cipher left for TLS 1.2 needs an RSA key, and our certificates have P-256 keys. The setting also affects
    gRPC clients in the process when they connect to servers with P-256 keys, so a site's process does not call it.
    """
    os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES256-GCM-SHA384"
    # else gRPC prints lines for handshakes that fail or ask for another name, as those of health checks do
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
