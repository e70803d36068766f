"""What is stored is not believed: every damage is noticed, and repaired or named; nothing that is whole is lost."""

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from functools import cache as remembered
from pathlib import Path
from threading import Event, Thread
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pytest

from data.lra import listops, pathfinder, retrieval, text
from data.lra.image import CIFARData
from data.lra.pathfinder_images import Geometry, draw
from data.store import cache, tokens
from data.store.cache import cached
from data.store.stored import StoredData
from data.systems import forecast
from data.systems.dynamics import VanDerPol
from stu.errors import OptionError
from stu.task import Splits
from tests import sources

DAMAGES = int(os.environ.get("STU_DAMAGES", "5"))  # of every kind of cache
SIZES = {"train": 40, "val": 10, "test": 10}
GEOMETRY = Geometry(
    side=32,
    border=1,
    seed_distance=7,
    marker_radius=1.5,
    contour_length=6,
    distractor_paddles=4,
    paddle_length=2,
    thickness=0.5,
    margins=(1,),
    continuity=1.0,
    target_contrast=1.5,
    distractor_contrast=2.0,
    second_contrast=None,
)


def make_listops(folder: Path, place: Path) -> StoredData[Any]:
    return listops.ListOpsData(dir=str(folder), **SIZES, min_length=5, max_length=40)


def make_text(folder: Path, place: Path) -> StoredData[Any]:
    return text.TextData(dir=str(folder), source=str(place / "lra_text"), seq_len=64, tokens="characters", **SIZES)


def make_retrieval(folder: Path, place: Path) -> StoredData[Any]:
    return retrieval.RetrievalData(dir=str(folder), source=str(place / "lra_retrieval"), seq_len=64, **SIZES)


def make_cifar(folder: Path, place: Path) -> StoredData[Any]:
    return CIFARData(dir=str(folder), source=str(place / "lra_image"), color=True, **SIZES)


def make_pathfinder(folder: Path, place: Path) -> StoredData[Any]:
    sizes = {"train": 10, "val": 2, "test": 2}
    return pathfinder.PathfinderData(dir=str(folder), workers=1, **sizes, **vars(GEOMETRY))


def make_forecast(folder: Path, place: Path) -> StoredData[Any]:
    return forecast.TrajectoryData(dir=str(folder), system=VanDerPol(), seq_len=16, dt=0.1, **SIZES)


MAKERS = {
    maker.__name__.removeprefix("make_"): maker
    for maker in (make_listops, make_text, make_retrieval, make_cifar, make_pathfinder, make_forecast)
}


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    """Many batches and files; generators that are quick at the second time; no waiting for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        for module in (tokens, listops, retrieval, text):
            patch.setattr(module, "ROWS", 8)
        patch.setattr(pathfinder, "CHUNK", 4)
        patch.setattr(pathfinder, "draw", remembered(draw))
        simulated: dict[bytes, np.ndarray] = {}

        def simulate(system: VanDerPol, start: np.ndarray, *arguments: Any, **options: Any) -> np.ndarray:
            key = start.tobytes()
            if key not in simulated:
                simulated[key] = plain(system, start, *arguments, **options)
            return simulated[key]

        plain = forecast.simulate
        patch.setattr(forecast, "simulate", simulate)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published files."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("lra_text", "lra_retrieval", "lra_image"):
        sources.WRITERS[name](folder / name)
    return folder


class Kind:
    """A cache as it was built: the bytes of all its files, and what is read from it."""

    def __init__(self, make: Callable[[Path, Path], StoredData[Any]], root: Path, place: Path) -> None:
        self.make, self.root, self.place = make, root, place
        self.folder = self.data(root).prepare().relative_to(root)
        self.contents = self.read(root)
        self.files = bytes_of(root)

    def data(self, root: Path) -> StoredData[Any]:
        return self.make(root, self.place)

    def read(self, root: Path) -> list[Any]:
        """Every example of every split; the units of a forecast."""
        data = self.data(root)
        examples = [[as_bytes(example) for example in split] for split in data.splits()]
        return [examples, *map(as_bytes, getattr(data, "units", tuple)())]

    def copy(self, root: Path) -> Path:
        return Path(shutil.copytree(self.root, root))


def as_bytes(value: Any) -> Any:
    return tuple(map(as_bytes, value)) if isinstance(value, tuple) else np.asarray(value).tobytes()


def bytes_of(root: Path) -> dict[str, bytes]:
    """All files below a folder; what spec.json says is compared, not how."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", params=sorted(MAKERS))
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, place: Path) -> Kind:
    return Kind(MAKERS[request.param], tmp_path_factory.mktemp(request.param), place)


def batches(content: bytes) -> list[int]:
    """Where the record batches of an Arrow file end."""
    reader = pa.BufferReader(content)
    try:
        with pa.ipc.open_stream(reader) as stream:
            return [reader.tell(), *(reader.tell() for _ in stream)]
    except pa.ArrowInvalid:
        return [0]


def damage(path: Path, random: np.random.Generator) -> str:
    """One damage, which leaves the time of the last change as it was, as a failing disk does."""
    content, facts = path.read_bytes(), path.stat()
    at = int(random.integers(max(1, len(content))))
    flipped = bytearray(content)
    flipped[at : at + 1] = bytes(byte ^ (1 << int(random.integers(8))) for byte in flipped[at : at + 1])
    damages = {
        "flipped": bytes(flipped),
        "cut": content[:at],
        "cut at a batch": content[: random.choice(batches(content))],
        "emptied": b"",
        "zeros": content[:at] + bytes(len(content) - at),
        "longer": content + b"\0" * 8,
        "deleted": None,
    }
    name = str(random.choice(list(damages), p=[0.4, *[0.1] * 6]))
    if (new := damages[name]) is None:
        path.unlink()
    else:
        path.write_bytes(new)
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    return f"{path.name} {name} at {at} of {len(content)}"


def test_every_damage_is_noticed_and_repaired(kind: Kind, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for seed in range(DAMAGES):
        random = np.random.default_rng(seed)
        root = kind.copy(tmp_path / str(seed))
        path = root / random.choice(sorted(kind.files))
        what = damage(path, random)
        changed = bytes_of(root) != kind.files
        assert kind.read(root) == kind.contents, what
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == (changed and path.parent == root / kind.folder), (what, lines)
        assert all(line.startswith(f"note: damaged: {path} ") for line in lines), (what, lines)
        assert strip_locks(bytes_of(root)) == strip_locks(kind.files), what
        assert kind.read(root) == kind.contents
        assert capsys.readouterr().err == ""
        shutil.rmtree(root)


def strip_locks(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if not name.endswith(".lock")}


def refuse(self: object, folder: Path) -> NoReturn:
    raise OptionError("source", None, "must be downloaded")


def test_what_cannot_be_rebuilt_is_named_and_left(kind: Kind, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(type(kind.data(tmp_path)), "build", refuse)
    for seed in range(DAMAGES // 2):
        random = np.random.default_rng(seed)
        root = kind.copy(tmp_path / str(seed))
        path = root / kind.folder / random.choice(os.listdir(root / kind.folder))
        what = damage(path, random)
        if (left := bytes_of(root)) == kind.files:
            continue
        for _ in range(2):
            with pytest.raises(OptionError) as caught:
                kind.read(root)
            assert str(caught.value).startswith(f"dir={root}: damaged: {path} "), what
            assert str(caught.value).endswith("and cannot be built again: source=None: must be downloaded")
            assert "\n" not in str(caught.value)
        found = bytes_of(root)
        assert {name: found[name] for name in left if not name.endswith(".lock")} == strip_locks(left), what
        assert len(capsys.readouterr().err.splitlines()) == 2


# Caches of earlier versions


def earlier(kind: Kind, root: Path) -> Path:
    """The same cache without its record."""
    spec = kind.copy(root) / kind.folder / "spec.json"
    found = json.loads(spec.read_text())
    assert set(found.pop("files")) == {path.name for path in spec.parent.iterdir()}
    assert cache.fingerprint(found) == spec.parent.name
    spec.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
    return root


def test_a_cache_of_an_earlier_version_is_recorded_when_it_is_first_read(kind: Kind, tmp_path: Path, capsys):
    root = earlier(kind, tmp_path / "cache")
    times = {path: path.stat().st_mtime_ns for path in (root / kind.folder).glob("*.arrow")}
    assert kind.read(root) == kind.contents
    assert strip_locks(bytes_of(root)) == strip_locks(kind.files)
    assert {path: path.stat().st_mtime_ns for path in times} == times, "nothing is built again"
    assert capsys.readouterr().err == ""


def test_a_cache_of_an_earlier_version_is_read_where_nothing_can_be_written(kind: Kind, tmp_path, monkeypatch, capsys):
    root = earlier(kind, tmp_path / "cache")

    def read_only(*arguments: object, **options: object) -> NoReturn:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache, "FileLock", read_only)
    assert kind.read(root) == kind.contents
    assert capsys.readouterr().err == ""


def test_damage_of_an_earlier_version_ends_nothing(kind: Kind, tmp_path: Path, capsys):
    """Without checksums, changed numbers cannot be told from others; all that cannot be read is noticed."""
    for seed in range(DAMAGES):
        random = np.random.default_rng(seed)
        root = earlier(kind, tmp_path / str(seed))
        path = root / kind.folder / random.choice(os.listdir(root / kind.folder))
        what = damage(path, random)
        found = kind.read(root)
        if "flipped" not in what and "zeros" not in what:
            assert found == kind.contents, what
        assert len(capsys.readouterr().err.splitlines()) <= 1


# One directory


def build(folder: Path) -> None:
    (folder / "numbers").write_text("1 2 3")


def failing(folder: Path) -> NoReturn:
    raise AssertionError("nothing is to be built")


def test_files_are_read_once_for_their_checksums(tmp_path: Path, monkeypatch):
    folder = cached(tmp_path, "x", {}, build)
    read: list[Path] = []
    plain = cache._crc32
    monkeypatch.setattr(cache, "_crc32", lambda path: read.append(path) or plain(path))
    cached(tmp_path, "x", {}, failing)
    assert read == [], "this process has just written them"
    monkeypatch.setattr(cache, "_whole", {})
    cached(tmp_path, "x", {}, failing)
    cached(tmp_path, "x", {}, failing)
    assert read == [folder / "numbers"]
    os.utime(folder / "numbers")
    cached(tmp_path, "x", {}, failing)
    assert read == [folder / "numbers"] * 2


def test_other_data_are_said_to_be_others(tmp_path: Path, capsys):
    def write(numbers: str) -> Callable[[Path], None]:
        def build(folder: Path) -> None:
            (folder / "letters").write_text("a b c")
            (folder / "numbers").write_text(numbers)

        return build

    folder = cached(tmp_path, "x", {}, write("1 2 3"))
    (folder / "numbers").write_text("")
    cached(tmp_path, "x", {}, write("1 2 4"))
    damaged, others = capsys.readouterr().err.splitlines()
    assert damaged == f"note: damaged: {folder}/numbers has 0 bytes, not 5 as spec.json says; the data are built again"
    assert others.startswith(f"note: numbers of {folder} differ from what was there before")
    assert others.endswith(f"what is left of them is in {folder}.damaged")
    assert (folder.with_suffix(".damaged") / "letters").read_text() == "a b c", "whole files are kept"
    (folder / "letters").unlink()
    cached(tmp_path, "x", {}, write("1 2 5"))
    assert (folder.with_suffix(".damaged") / "letters").exists()
    assert (folder.with_suffix(".damaged1") / "numbers").read_text() == "1 2 4"


def test_an_end_between_two_renames_loses_nothing(tmp_path: Path, monkeypatch):
    folder = cached(tmp_path, "x", {}, build)
    (folder / "numbers").unlink()

    def killed(*arguments: object) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, "put_in_place", killed)
        with pytest.raises(KeyboardInterrupt):
            cached(tmp_path, "x", {}, build)
    assert not folder.exists()
    assert cached(tmp_path, "x", {}, failing) == folder
    assert (folder / "numbers").read_text() == "1 2 3"
    assert list(tmp_path.glob("x/*/")) == [folder]


def test_the_whole_files_of_a_build_that_continues_are_kept(place: Path, tmp_path: Path, monkeypatch):
    kind = Kind(make_pathfinder, tmp_path / "cache", place)
    folder = kind.root / kind.folder
    (folder / "00001.arrow").write_bytes(b"")
    drawn: list[int] = []

    def counted(geometry: object, seed: int, chunk: int, size: int) -> object:
        drawn.append(chunk)
        if len(drawn) == 1:
            raise KeyboardInterrupt
        return draw(geometry, seed, chunk, size)

    monkeypatch.setattr(pathfinder, "draw", counted)
    with pytest.raises(KeyboardInterrupt):
        kind.read(kind.root)
    assert (folder / "00000.arrow").exists(), "the damaged directory stays until another one is complete"
    assert kind.read(kind.root) == kind.contents
    assert drawn == [1, 1]


def test_a_damaged_file_of_an_interrupted_build_is_built_again(place: Path, tmp_path: Path, monkeypatch, capsys):
    kind = Kind(make_pathfinder, tmp_path / "whole", place)
    calls: list[int] = []

    def interrupted(geometry: object, seed: int, chunk: int, size: int) -> object:
        calls.append(chunk)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(geometry, seed, chunk, size)

    monkeypatch.setattr(pathfinder, "draw", interrupted)
    root = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        kind.read(root)
    partial = (root / kind.folder).with_suffix(".partial")
    content = bytearray((partial / "00000.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (partial / "00000.arrow").write_bytes(content)
    assert kind.read(root) == kind.contents
    assert calls == [0, 1, 2, 0, 2, 3]


# Locks


def test_who_is_waited_for_is_said_once(tmp_path: Path, monkeypatch):
    said: list[str] = []
    lock, held, free = tmp_path / "x" / f"{cache.fingerprint({})}.lock", Event(), Event()
    lock.parent.mkdir()

    def hold() -> None:
        with cache._locked(lock, "x"):
            held.set()
            free.wait(30)

    def say(line: str) -> None:
        said.append(line)
        free.set()

    monkeypatch.setattr(cache, "say", say)
    monkeypatch.setattr(cache, "QUIET_SECONDS", 0)
    thread = Thread(target=hold)
    thread.start()
    held.wait(30)
    cached(tmp_path, "x", {}, build)
    thread.join()
    who = f"process {os.getpid()} on {socket.gethostname()}, for 0:00:0"
    assert len(said) == 1
    assert said[0].startswith(f"waiting for the data of x, which are being built: {who}")
    assert said[0].endswith(f", by the lock file {lock}")


@pytest.fixture(params=["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def _no_flock(request: pytest.FixtureRequest, monkeypatch) -> None:
    import errno
    import fcntl

    def flock(*arguments: object) -> NoReturn:
        raise OSError(getattr(errno, request.param), "no locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("_no_flock")
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch, capsys):
    folder = cached(tmp_path, "x", {}, build)
    soft = folder.with_suffix(".softlock")
    assert not soft.exists()
    assert capsys.readouterr().err == ""
    soft.write_text("123\nelsewhere\n")  # killed on another machine
    (folder / "numbers").unlink()
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        soft.unlink(missing_ok=True)

    monkeypatch.setattr(cache, "say", say)
    monkeypatch.setattr(cache, "QUIET_SECONDS", 0)
    assert cached(tmp_path, "x", {}, build) == folder
    assert said[0].startswith("waiting for the data of x, which are being built: process 123 on elsewhere, for 0:00:0")
    assert said[0].endswith(f"by the lock file {soft}; delete it if that process is gone")
    assert len(said) == 2


def test_a_folder_that_cannot_be_read_is_not_damaged(tmp_path: Path, monkeypatch):
    folder = cached(tmp_path, "x", {}, build)
    monkeypatch.setattr(cache, "_whole", {})

    def denied(path: Path) -> NoReturn:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(cache, "_crc32", denied)
    with pytest.raises(OptionError, match=r"reading them failed: .*Permission denied"):
        cached(tmp_path, "x", {}, failing)
    assert (folder / "numbers").read_text() == "1 2 3"


def end(number: int) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_killed_worker_is_one_message():
    with pytest.raises(OptionError, match="workers=2: one of them was killed"):
        list(cache.in_processes(end, [(0,), (1,)], 2))


def test_a_home_that_is_not_there(tmp_path: Path):
    with pytest.raises(OptionError, match="dir=~nobody-of-that-name/x: must be a folder: "):
        cached("~nobody-of-that-name/x", "x", {}, build)


def test_tasks_computed_on_demand_store_nothing(tmp_path: Path):
    from data.memory.copying import CopyingData
    from data.systems.lds import LDSData

    for data in (LDSData(seq_len=8), CopyingData(seq_len=32)):
        assert data.prepare() is None
        assert not hasattr(data, "dir")
        assert [len(split) for split in data.splits()] == [getattr(data, name) for name in Splits._fields]
