"""What goes over the wire: manifests, frames and the protobuf messages of package fl.v1."""
