"""The decoders of bytes from the network and of files that people edit, as the fuzzer and the corpus test call them.

Bad bytes may raise our own errors and nothing else. The first byte of an input chooses the decoder, so one corpus
serves all of them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message

from fl_adapters.cli.federation.server import read_job
from fl_adapters.environments.remote import job_fields
from fl_adapters.job import Job
from fl_runtime.aggregation.metrics.pooling import pooled, to_json
from fl_runtime.aggregation.trees import ubjson
from fl_runtime.aggregation.trees.document import TreeModel
from fl_runtime.aggregation.trees.strategies import ENCODING, WEIGHT, TreeBagging
from fl_runtime.errors import FederationError, ProtocolError
from fl_runtime.server.calls import limits, service
from fl_runtime.server.calls.requests import first_request
from fl_runtime.server.calls.service import FederationService
from fl_runtime.server.federation.requests import read_object
from fl_runtime.transport.base import Peer
from fl_runtime.trust.identity import Identity
from fl_runtime.trust.policy import read_policy
from fl_runtime.types import Arrays, ServerState, Update
from fl_runtime.wire import frames
from fl_runtime.wire.dtypes import dtype_of
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest, differences

M = TypeVar("M", bound=Message)
MOST_BYTES = 2**20
_KNOWN = Manifest.of({"a": np.zeros((3, 2), np.float32), "b": np.zeros(5, np.int8)})
_SITES = ("north", "south")
_FOLDER = tempfile.TemporaryDirectory(prefix="fuzz-")  # of the files of policies and jobs
_NORTH = Identity("study", "site", "north", "north-hospital")
_PEER = Peer("north", lambda callback: True)
_LENA = Identity("study", "admin", "lena", "north-hospital", "lead")

_FIELDS = {"num_feature": "2", "num_class": "0", "num_target": "1", "base_score": "5E-1"}
_MODEL = {"gbtree_model_param": {"num_trees": "1"}, "tree_info": [0], "iteration_indptr": [0, 1], "trees": []}
TREE_HEAD: dict[str, Any] = {
    "learner": {
        "attributes": {},
        "gradient_booster": {"name": "gbtree", "model": _MODEL},
        "learner_model_param": _FIELDS,
        "objective": {"name": "reg:squarederror"},
    },
    "version": [3, 0, 0],
}
"""The head of a small model of XGBoost, and its only tree: a split and two leaves."""
TREE: dict[str, Any] = {
    **{name: np.zeros(3, np.float32) for name in ("base_weights", "loss_changes", "split_conditions", "sum_hessian")},
    **{name: np.zeros(3, np.uint8) for name in ("default_left", "split_type")},
    "categories": np.zeros(0, np.int32),
    "categories_nodes": np.zeros(0, np.int32),
    "categories_segments": np.zeros(0, np.int64),
    "categories_sizes": np.zeros(0, np.int64),
    "id": 0,
    "left_children": np.array([1, -1, -1], np.int32),
    "parents": np.array([2147483647, 0, 0], np.int32),
    "right_children": np.array([2, -1, -1], np.int32),
    "split_indices": np.zeros(3, np.int32),
    "tree_param": {"num_nodes": "3", "size_leaf_vector": "1", "num_feature": "2"},
}


def one(data: bytes) -> None:
    """Decode one input. Our own errors are the right answer to bad bytes; any other error is a finding."""
    decode = DECODERS[data[0] % len(DECODERS)] if data else None
    if decode is not None:
        try:
            decode(data[1:])
        except FederationError as error:
            FederationError.from_wire(error.to_wire())


def manifest(data: bytes) -> None:
    """A manifest: if its buffer is small enough to allocate, the tensors cover it without gaps or overlaps."""
    found = Manifest.from_proto(_parsed(pb.Manifest, data))
    assert Manifest.from_proto(found.to_proto()) == found
    differences(_KNOWN, found)
    if found.nbytes <= MOST_BYTES:
        arrays, extras = found.views(np.zeros(found.nbytes, np.uint8))
        assert sum(a.nbytes for a in (*arrays.values(), *extras.values())) == found.nbytes
        for spec in found.tensors:
            assert (extras if spec.extra else arrays)[spec.name].dtype == dtype_of(spec.dtype)


def frame(data: bytes) -> None:
    """A single frame: what our reader accepts, protobuf must accept too."""
    if frames.is_frame(data):
        inside = bytes(frames.frame_data(data))
        assert _parsed(pb.UpdatePart, data).data == inside


def transfer(data: bytes) -> None:
    """A whole upload: a header, then the rest cut into frames of 64 bytes. Nothing is written past the buffer."""
    size = int.from_bytes(data[:2], "big")
    header = _parsed(pb.UpdatePart, data[2 : 2 + size]).update
    _service()._update_fields(_PEER, header)
    found = Manifest.from_proto(header.payload.manifest) if header.payload.HasField("manifest") else _KNOWN
    if found.nbytes > MOST_BYTES:
        return
    guarded = np.full(found.nbytes + 64, 0x55, np.uint8)
    receiver = frames.Receiver(found, header.payload.digests, guarded[: found.nbytes])
    rest = data[2 + size :]
    try:
        receiver.take(header.payload.inline)
        for start in range(0, len(rest), 64):
            receiver.take(frames.frame_data(rest[start : start + 64]))
        receiver.finish()
    finally:
        assert (guarded[found.nbytes :] == 0x55).all()
    assert frames.payload_digest(header.payload)


def registration(data: bytes) -> None:
    request = _parsed(pb.RegisterRequest, data)
    Manifest.from_proto(request.manifest)
    service._terms(request.terms_json)


def score(data: bytes) -> None:
    """The metrics of a model: once they are read, they can be pooled with those of another site, and recorded."""
    metrics = _service()._metrics(_PEER, _parsed(pb.ScoreRequest, data).metrics_json)
    to_json(pooled([(metrics, 1), (metrics, 3), ({"loss": 0.5}, 2)]))
    to_json(metrics)


def tunnel(data: bytes) -> None:
    first_request("Tunnel", iter([data]))


def control(data: bytes) -> None:
    """A control request, such as those about jobs."""
    assert isinstance(read_object(data), dict)


def identity(data: bytes) -> None:
    """The identity in a certificate: a valid one survives a round trip."""
    found = Identity.from_uri(data.decode("utf-8", "replace"))
    assert Identity.from_uri(found.uri) == found


def trees(data: bytes) -> None:
    """An update of trees: one that passes the check of its strategy can be appended to a model, and written."""
    size = int.from_bytes(data[:2], "big")
    arrays, extras = _tree_arrays(data[2 : 2 + size], data[2 + size :]), {WEIGHT: np.ones(1)}
    strategy, base = TreeBagging(), _tree_arrays(ubjson.dumps(TREE_HEAD), ubjson.dumps(TREE))
    for round_, before in ((1, base), (0, {})):
        update = Update(
            "job", round_, "", "north", 1, 0, arrays, 3, content="encoded", encoding=ENCODING, extras=extras
        )
        strategy.check(update)
        aggregator = strategy.aggregator(before, _allocated, {}, ServerState())
        aggregator.add(update)
        TreeModel.from_arrays(aggregator.result()[0]).document()


def tree_document(data: bytes) -> None:
    """A model file of XGBoost, as UBJSON or JSON, that a site begins with."""
    model = TreeModel.from_document(data)
    assert TreeModel.from_arrays(model.to_arrays()).trees == model.trees


def policy(data: bytes) -> None:
    """The policy file of a site: one that can be read can be applied."""
    found = read_policy(_file(data))
    for rule in (
        lambda: found.check_strategy("job", "fedavg", _NORTH),
        lambda: found.check_submitter("job", _LENA, _NORTH),
        lambda: found.check_names(["a.weight"], _NORTH),
        lambda: found.check_bytes(10, _NORTH),
    ):
        try:
            rule()
        except FederationError as error:
            error.to_wire()


def job(data: bytes) -> None:
    """A job file: one that can be read can be submitted."""
    fields = job_fields(Job.from_file(_file(data)))
    read_job(read_object(json.dumps(fields).encode()), _SITES)


def submitted_job(data: bytes) -> None:
    """A job as JSON values, as the server of a federation gets it."""
    read_job(read_object(data), _SITES)


DECODERS: tuple[Callable[[bytes], Any], ...] = (
    manifest,
    frame,
    transfer,
    registration,
    score,
    control,
    identity,
    tunnel,
    trees,
    tree_document,
    policy,
    job,
    submitted_job,
)


def _tree_arrays(head: bytes, tree: bytes) -> Arrays:
    """The arrays of a model with one tree."""
    arrays = {"head": np.frombuffer(head, np.uint8), "trees": np.frombuffer(tree, np.uint8)}
    sizes = np.array([len(head), len(tree), 1], np.int64)
    return {**arrays, "ends": np.array([len(tree)], np.int64), "sizes": sizes}


def _allocated(arrays: Arrays, extras: Arrays) -> tuple[Arrays, Arrays]:
    return {n: np.empty_like(a) for n, a in arrays.items()}, {n: np.empty_like(a) for n, a in extras.items()}


def _service() -> FederationService:
    """A service without a run, which can read fields of messages alone."""
    found = object.__new__(FederationService)
    found._metric_names = limits.MetricNames()
    return found


def _file(data: bytes) -> Path:
    """A file with these contents. The next call overwrites it."""
    path = Path(_FOLDER.name) / "file.yml"
    path.write_bytes(data)
    return path


def _parsed(kind: type[M], data: bytes) -> M:
    try:
        return kind.FromString(data)
    except DecodeError:
        raise ProtocolError(f"this is no {kind.__name__}") from None
