"""The wire format: tensor manifests, payload frames, and the protobuf messages of package `fl.v1`."""
