"""Transports: how bytes travel between a site and the server.

Import the modules `grpc` and `memory` only where a connection is made, since importing gRPC is slow.
"""

import os

# gRPC reads this when it is loaded. With fork support, processes forked from this one (data loader workers) would get
# gRPC threads that continue with this process's connection.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
