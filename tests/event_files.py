"""What event files say, read as TensorBoard reads them: tensorboardX has no reader."""

import struct
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

FRAME = struct.Struct("<QI")  # length, and its checksum, before an event; another checksum follows


def events(folder: Path) -> list[Event]:
    """Of all files in a folder in turn, without what a later start says is to be forgotten."""
    kept: list[Event] = []
    for file in sorted(folder.iterdir(), key=lambda file: int(file.suffix[1:])):
        for event in _events(file.read_bytes()):
            if event.session_log.status == SessionLog.START:
                kept = [earlier for earlier in kept if earlier.step < event.step]
            kept.append(event)
    return kept


def _events(content: bytes) -> Iterator[Event]:
    at = 0
    while at < len(content):
        length, _ = FRAME.unpack_from(content, at)
        at += FRAME.size + length + 4
        yield Event.FromString(content[at - 4 - length : at - 4])


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    """Step, name and value."""
    found = [(event.step, value) for event in events(folder) for value in event.summary.value]
    return [(step, value.tag, value.simple_value) for step, value in found if value.HasField("simple_value")]


def images(folder: Path) -> dict[str, tuple[int, bytes]]:
    """By their names, step and PNG."""
    found = [(event.step, value) for event in events(folder) for value in event.summary.value]
    return {v.tag: (step, v.image.encoded_image_string) for step, v in found if v.HasField("image")}


def hyperparameters(folder: Path) -> tuple[dict[str, object], list[str]]:
    """Names and values of the latest start, and the metrics that are results."""
    values, results = {}, []
    for event in events(folder):
        for value in event.summary.value:
            content = HParamsPluginData.FromString(value.metadata.plugin_data.content)
            given = content.session_start_info.hparams
            values |= {name: getattr(one, str(one.WhichOneof("kind"))) for name, one in given.items()}
            results = [metric.name.tag for metric in content.experiment.metric_infos] or results
    return values, results
