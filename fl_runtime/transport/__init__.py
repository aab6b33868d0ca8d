"""How bytes get from a site to the server and back. Import `grpc` or `memory` from here only where you connect."""

import os

# Read when gRPC is loaded. With it, every process forked from this one (a data loader's worker) would get threads of
# gRPC that go on with this one's connection; a worker has no part in that.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
