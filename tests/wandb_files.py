"""What a .wandb file says: wandb has no reader of its own for Python."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32768  # bytes; records that don't fit are cut: LevelDB's log format
HEADER = struct.Struct("<IHB")  # checksum, length, and which part of a record follows
LAST = (1, 4)  # parts that end a record: the whole, and the last one


def records(file: Path) -> Iterator[Record]:
    """All that is written, in turn."""
    content, at, parts = file.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while at < len(content):
        if (left := BLOCK - at % BLOCK) < HEADER.size:
            at += left
            continue
        _, length, part = HEADER.unpack_from(content, at)
        at += HEADER.size
        parts += content[at : at + length]
        at += length
        if part in LAST:
            yield Record.FromString(parts)
            parts = b""


class Written:
    """A run as the file has it: what it is called, its config, rows, summary and how it ended."""

    def __init__(self, file: Path) -> None:
        self.run: Any = None
        self.config: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None
        self.preempting = False
        for record in records(file):
            match record.WhichOneof("record_type"):
                case "run":
                    self.run = record.run
                    self.config |= _values(record.run.config.update)
                case "config":
                    self.config |= _values(record.config.update)
                case "history":
                    self.rows.append(_values(record.history.item))
                case "summary":
                    self.summary |= _values(record.summary.update)
                case "preempting":
                    self.preempting = True
                case "exit":
                    self.exit_code = record.exit.exit_code


def _values(items: Any) -> dict[str, Any]:
    """Names, those of nested ones joined by dots, and values."""
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
