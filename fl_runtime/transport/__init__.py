"""How bytes get from a site to the server and back. Import `grpc` or `memory` from here only where you connect."""
