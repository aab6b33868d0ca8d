"""The one setting of gRPC that must be made before it is used."""

from __future__ import annotations

import os


def only_tls_1_3() -> None:
    """Take TLS 1.2 off the table for servers of this process, and of ours alone: call it before gRPC is used.

    What is left for TLS 1.2 needs an RSA key, and our certificates have P-256 keys. Other gRPC clients of the process
    would lose TLS 1.2 with such servers too, so a site's process does not call it.
    """
    os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES256-GCM-SHA384"
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else a line on stderr for every stranger that knocks
