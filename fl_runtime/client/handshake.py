"""The handshake of a site: its registration in messages of bounded size, and answers to the server's questions."""

from __future__ import annotations

import queue
from collections.abc import Mapping

from fl_runtime.client.calls import PatientCalls, parsed
from fl_runtime.errors import ConnectionLostError, ProtocolError
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.names import MAX_NAME_CHARS, Facts, Names, NamesDigest, excerpt_of

_TENSORS = 1_000  # in a message: with the longest names and most dimensions 5 MiB, below what gRPC takes


class Handshake:
    """Registers a site and waits until all sites have agreed."""

    def __init__(self, calls: PatientCalls, facts: Facts, *, parts: bool) -> None:
        """Make a handshake that has not begun.

        Args:
            calls: The site's calls.
            facts: What must be equal at all sites. Lists of names go to servers that take `parts` only.
            parts: Whether the server takes several messages.
        """
        self._calls, self._parts = calls, parts
        self._texts = {name: fact for name, fact in facts.items() if isinstance(fact, str)}
        lists = {name[:MAX_NAME_CHARS]: fact for name, fact in facts.items() if isinstance(fact, Names)}
        self._names = lists if parts else {}

    def register(self, request: pb.RegisterRequest) -> pb.RegisterReply:
        """Register, and wait for the other sites.

        Args:
            request: The registration, with its whole manifest. What must be equal is added to it.

        Returns:
            The server's last reply.
        """
        for name, text in self._texts.items():
            request.agreement[name] = text
        request.names.extend(NamesDigest.of(names).to_proto(name) for name, names in self._names.items())
        if not self._parts:
            return self._calls.ask("Register", request, pb.RegisterReply)
        messages = [part.SerializeToString() for part in _parts(request)]
        return self._calls.repeat(lambda: self._attempt(messages))

    def _attempt(self, messages: list[bytes]) -> pb.RegisterReply:
        outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        for message in messages:
            outgoing.put(message)
        try:
            for message in self._calls.replies("Register", iter(outgoing.get, None)):
                reply = parsed(pb.RegisterReply, message)
                if reply.HasField("question"):
                    outgoing.put(_answer(reply.question, self._names))
                elif not reply.HasField("waiting"):
                    return reply
        finally:
            outgoing.put(None)  # in any case, so that the sending thread does not wait for ever
        raise ConnectionLostError("the server ended the call Register without an answer")


def _parts(request: pb.RegisterRequest) -> list[pb.RegisterRequest]:
    """The request, cut into messages of at most so many tensors. It becomes the first of them."""
    tensors = request.manifest.tensors
    starts = range(_TENSORS, len(tensors), _TENSORS)
    more = [pb.RegisterRequest(manifest=pb.Manifest(tensors=tensors[at : at + _TENSORS])) for at in starts]
    del tensors[_TENSORS:]
    for part in [request, *more][:-1]:
        part.more = True
    return [request, *more]


def _answer(question: pb.NameQuestion, names: Mapping[str, Names]) -> bytes:
    if question.name not in names:
        raise ProtocolError(
            f"the server asks for the list of names {question.name[:100]!r}, which this site has not registered",
            fix="ask the server's operator",
        )
    excerpt = excerpt_of(names[question.name], question.start, question.stop).to_proto(question.name)
    return pb.RegisterRequest(excerpt=excerpt).SerializeToString()
