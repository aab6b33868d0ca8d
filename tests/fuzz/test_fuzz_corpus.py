"""The fuzzer's corpus, replayed, and random bytes beside it."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fuzzed_decoders import DECODERS, TREE, TREE_HEAD, one
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_runtime.aggregation.trees import ubjson
from fl_runtime.wire import frames
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest

CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())
ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(3, 2), "b": np.arange(5, dtype=np.int8)}


def seeds() -> dict[str, bytes]:
    """Return a valid message for every decoder, which the corpus began with."""
    manifest = Manifest.of(ARRAYS, {"m": np.zeros(2, np.float64)})
    plain = Manifest.of(ARRAYS)
    payload = frames.describe(plain, plain.digests(ARRAYS, {}), known=False)
    header = pb.UpdateHeader(round=1, content="weights", num_examples=3, metrics_json='{"loss": 0.5}', payload=payload)
    update = pb.UpdatePart(update=header).SerializeToString()
    body = b"".join(frames.frames(plain.pieces(ARRAYS, {})))
    inline = pb.UpdatePart(update=header)
    inline.update.payload.inline = b"".join(plain.pieces(ARRAYS, {}))
    whole = inline.SerializeToString()
    register = pb.RegisterRequest(manifest=manifest.to_proto(), agreement={"every": "epoch"}, capabilities=["x"])
    summary = {"kind": "auc", "value": 0.7, "weight": 5, "histogram": [[0, 1, 2], [1, 2, 0]]}
    head, tree = ubjson.dumps(TREE_HEAD), ubjson.dumps(TREE)
    whole_model = {**TREE_HEAD, "learner": {**TREE_HEAD["learner"]}}
    booster = TREE_HEAD["learner"]["gradient_booster"]
    whole_model["learner"]["gradient_booster"] = {**booster, "model": {**booster["model"], "trees": [TREE]}}
    rules: dict[str, Any] = {
        "filters": [{"name": "ExcludeVars", "names": ["head.*"]}],
        "exchange": "adapters",
        "max_round_bytes": 10**8,
        "privacy": {"epsilon": 8.0, "delta": 1e-5},
        "submitters": {"roles": ["lead"], "organisations": "own"},
        "apps": {"tumour": "python train.py"},
    }
    settings = {"name": "a", "app": "train", "rounds": 3, "strategy": "fedadam:lr=0.1", "min_sites": 1}
    part = pb.TunnelPart(session=pb.Session(job="job", attempt=1), peer="south", stream="s1", opened="ring", credit=9)
    messages = {
        "manifest": manifest.to_proto().SerializeToString(),
        "frame": frames.frame([memoryview(b"hello")]),
        "transfer": len(update).to_bytes(2, "big") + update + body,
        "registration": register.SerializeToString(),
        "score": pb.ScoreRequest(
            version=1, metrics_json=json.dumps({"loss": 1e3, "x": math.nan, "auc": summary})
        ).SerializeToString(),
        "control": b'{"job": {"name": "a", "rounds": 3}}',
        "identity": b"fl-adapters://study/admin/ada%40x?organisation=north&role=lead",
        "tunnel": part.SerializeToString(),
        "trees": len(head).to_bytes(2, "big") + head + tree,
        "tree_document": ubjson.dumps(whole_model),
        "policy": yaml.safe_dump(rules).encode(),
        "job": yaml.safe_dump(settings).encode(),
        "submitted_job": json.dumps(settings).encode(),
    }
    found = {d.__name__: bytes([n]) + messages[d.__name__] for n, d in enumerate(DECODERS)}
    return found | {"transfer-inline": bytes([2]) + len(whole).to_bytes(2, "big") + whole}


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_the_corpus_ends_in_our_own_errors_alone(path: Path) -> None:
    one(path.read_bytes())


def test_good_messages_are_in_the_corpus_and_are_taken() -> None:
    kept = {path.read_bytes() for path in CORPUS}
    for name, data in seeds().items():
        assert data in kept, name
        DECODERS[data[0]](data[1:])


def test_good_messages_with_harm_done_to_them() -> None:
    draw = random.Random(11)
    for data in seeds().values():
        for _ in range(300):
            harm = bytearray(data)
            for _ in range(draw.randrange(1, 6)):
                at = draw.randrange(1, len(harm))
                match draw.randrange(4):
                    case 0:
                        harm[at] ^= 1 << draw.randrange(8)
                    case 1:
                        del harm[at : at + draw.randrange(1, 9)]
                    case 2:
                        harm[at:at] = draw.randbytes(draw.randrange(1, 9))
                    case 3:
                        harm[at:at] = harm[1 : 1 + draw.randrange(1, 30)]
                if len(harm) < 2:
                    break
            one(bytes(harm))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(DECODERS) - 1), st.binary(max_size=400))
def test_any_bytes_end_in_our_own_errors_alone(number: int, data: bytes) -> None:
    one(bytes([number]) + data)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.builds(
            pb.Tensor,
            name=st.text(max_size=5),
            dtype=st.sampled_from(["float32", "bfloat16", "bool", "complex128", "object", "O", "f4,f4", "<M8[s]", ""]),
            shape=st.lists(st.sampled_from([0, 1, 2, 3, 2**20, 2**32, 2**63, 2**64 - 1]), max_size=40),
            extra=st.booleans(),
        ),
        max_size=6,
    )
)
def test_any_manifest_ends_in_our_own_errors_alone(tensors: list[pb.Tensor]) -> None:
    one(b"\0" + pb.Manifest(tensors=tensors).SerializeToString())
