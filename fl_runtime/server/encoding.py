"""What the tensors of an encoded update must be."""

from __future__ import annotations

from fl_runtime.errors import UpdateRefusedError
from fl_runtime.filters.base import Layout
from fl_runtime.filters.ckks import HomomorphicCKKS
from fl_runtime.filters.server import travelling, what_ran
from fl_runtime.wire.dtypes import dtype_name, dtype_of
from fl_runtime.wire.manifest import Manifest, TensorSpec


def travelling_manifest(
    agreed: Manifest, content: str, encoding: str, takes: str, encrypted: HomomorphicCKKS | None
) -> Manifest:
    """The tensors of an update, given those that were agreed on. takes: the content that the strategy sums.
    encrypted: how the job encrypts.

    UpdateRefusedError for another content, ProtocolError for an encoding that cannot be read.
    """
    foreign = content == "encoded" and not what_ran(encoding)
    if foreign != (takes == "encoded"):
        raise UpdateRefusedError(
            f"an update of content {content!r} in the encoding {encoding[:60]!r}, where {takes} are summed",
            fix="use the same adapter and the same strategy at every site",
        )
    if foreign:
        return agreed
    layout: Layout = {t.name: (dtype_of(t.dtype), t.shape) for t in agreed.tensors if not t.extra}
    found = travelling(layout, content, encoding, encrypted)
    return Manifest(tuple(TensorSpec(n, dtype_name(d, tensor=n), shape) for n, (d, shape) in found.items()))
