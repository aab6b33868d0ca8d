"""Small files that a model needs beside its weights: which may travel, how large they may be, what they must hold.

A site checks its files before it sends them, and the server checks them again. They are data: names of code in them are
refused, and no file is opened by its kind on the server.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from enum import Enum, auto
from typing import Any

from fl_runtime.errors import ProtocolError
from fl_runtime.text import parse_json, printable
from fl_runtime.wire.manifest import Manifest

MAX_FILES = 24
MAX_TOTAL_BYTES = 64 * 2**20


class FileKind(Enum):
    """What a file holds, which decides how it is checked and how large it may be."""

    CONFIG = auto()
    VOCABULARY = auto()
    TEXT = auto()
    SENTENCE_PIECE = auto()

    @property
    def max_bytes(self) -> int:
        """Largest size of a file of this kind, in bytes."""
        return 4 * 2**20 if self is FileKind.CONFIG else 48 * 2**20


MODEL_FILES: Mapping[str, FileKind] = {
    **dict.fromkeys(
        (
            "config.json",
            "generation_config.json",
            "adapter_config.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "preprocessor_config.json",
            "processor_config.json",
            "video_preprocessor_config.json",
            "chat_template.json",
        ),
        FileKind.CONFIG,
    ),
    **dict.fromkeys(("tokenizer.json", "vocab.json", "added_tokens.json"), FileKind.VOCABULARY),
    **dict.fromkeys(("vocab.txt", "merges.txt", "chat_template.jinja"), FileKind.TEXT),
    **dict.fromkeys(
        ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "source.spm", "target.spm"),
        FileKind.SENTENCE_PIECE,
    ),
}
"""Names of the files that may travel, and what each holds. Nothing that runs, such as *.py, is among them."""

WEIGHTS_FILES = ("", "adapter_model.safetensors")
"""Files that a framework may read the weights from; "" stands for the server's own model.safetensors."""

_MAX_JSON_PARTS = 6_000_000
"""Most commas, lists and objects in a JSON file. A tokenizer with 250,000 tokens has 2 million."""
_CODE_KEYS = re.compile(r"auto_map|custom_pipelines|trust_remote_code|.*(attn|experts)_implementation.*")
_ONE_AT_A_TIME = threading.Lock()  # a parsed vocabulary takes ten times the memory of its file
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def check_described(manifest: Manifest) -> None:
    """Check the names, number and sizes of files before their contents are sent.

    Args:
        manifest: One tensor for each file: its name, uint8, one dimension.

    Raises:
        ProtocolError: A file may not travel, or is too large.
    """
    if len(manifest.tensors) > MAX_FILES or manifest.nbytes > MAX_TOTAL_BYTES:
        raise _refused(
            f"{len(manifest.tensors)} files of {manifest.nbytes} bytes",
            f"the limits are {MAX_FILES} files and {MAX_TOTAL_BYTES} bytes",
        )
    for spec in manifest.tensors:
        kind = MODEL_FILES.get(spec.name)
        if kind is None:
            raise _refused(f"the file {spec.name[:100]!r}", f"the files are: {', '.join(MODEL_FILES)}")
        if spec.dtype != "uint8" or len(spec.shape) != 1 or spec.extra:
            raise _refused(f"the file {spec.name!r} as {spec}", "the bytes of a file are its contents")
        if spec.nbytes > kind.max_bytes:
            raise _refused(f"{spec.name} of {spec.nbytes} bytes", f"the limit is {kind.max_bytes}")


def check_contents(name: str, data: bytes) -> None:
    """Check what a file holds.

    Args:
        name: Its name, one of `MODEL_FILES`.
        data: Its contents.

    Raises:
        ProtocolError: It does not hold what files of this name do, or it names code to be loaded.
    """
    kind = MODEL_FILES[name]
    try:
        with _ONE_AT_A_TIME:
            if kind is FileKind.SENTENCE_PIECE:
                _check_sentence_piece(memoryview(data))
            elif kind is FileKind.TEXT:
                _check_text(data.decode())
            else:
                _check_json(data, config=kind is FileKind.CONFIG)
    except (ValueError, IndexError) as error:
        raise _refused(name, printable(str(error), 200)) from None


def names_code(value: Any) -> str | None:
    """Return the key of a configuration that makes a framework load code, or None if it has none.

    Args:
        value: A JSON value.
    """
    level = [value]
    while level:
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                for key, inner in item.items():
                    if loads_code(key, inner):
                        return str(key)
                below += item.values()
            elif isinstance(item, list):
                below += item
        level = below
    return None


def loads_code(key: str, value: Any) -> bool:
    """Return whether an entry of a configuration makes a framework load code.

    Args:
        key: Its key.
        value: Its JSON value.
    """
    if key == "auto_mapping":  # the class of a PEFT adapter's base model
        library = value.get("parent_library") if isinstance(value, dict) else value
        return library is not None and not str(library).startswith("transformers.")
    if key == "megatron_core":
        return value not in (None, "megatron.core")
    return value is not None and _CODE_KEYS.fullmatch(key) is not None


def _check_json(data: bytes, *, config: bool) -> None:
    parts = data.count(b",") + data.count(b"[") + data.count(b"{")
    if parts > _MAX_JSON_PARTS:
        raise ValueError(f"it has {parts} entries; the limit is {_MAX_JSON_PARTS}")
    value = parse_json(data, limit_chars=len(data))
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    if config and (key := names_code(value)):
        raise ValueError(f"its entry {key!r} makes a framework load code")


def _check_text(text: str) -> None:
    if found := _CONTROL.search(text):
        raise ValueError(f"it has the control character {found[0]!r}")


def _check_sentence_piece(data: memoryview) -> None:
    """Raise ValueError or IndexError unless the bytes are a protobuf `ModelProto` of SentencePiece, with pieces."""
    pieces = 0
    for number, field in _fields(data):
        if number > 5:
            raise ValueError("it is not a model of SentencePiece")
        if number == 1:
            pieces += 1
            texts = [inner for inner_number, inner in _fields(field) if inner_number == 1]
            if len(texts) != 1:
                raise ValueError("a piece has no text")
            bytes(texts[0]).decode()
    if not pieces:
        raise ValueError("it has no pieces")


def _fields(message: memoryview) -> list[tuple[int, memoryview]]:
    """The fields of a protobuf message: number and bytes. Raises ValueError or IndexError if it is malformed."""
    found, at = [], 0
    while at < len(message):
        tag, at = _varint(message, at)
        wire = tag & 7
        if wire == 0:
            start = at
            _, at = _varint(message, at)
        elif wire == 2:
            length, start = _varint(message, at)
            at = start + length
        elif wire in (1, 5):
            start, at = at, at + (8 if wire == 1 else 4)
        else:
            raise ValueError("it is not a protobuf message")
        if at > len(message):
            raise ValueError("it ends within a field")
        found.append((tag >> 3, message[start:at]))
    return found


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("it has a number that is too long")


def _refused(what: str, why: str) -> ProtocolError:
    return ProtocolError(
        f"{what} cannot go with the model: {why}", fix="leave it out, or keep all files at the site: share_files: false"
    )
