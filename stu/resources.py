"""What this machine has: sizes that cannot fit are refused before anything of that size is made."""

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from stu.errors import OptionError

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container
CGROUPS = Path("/sys/fs/cgroup")
GIB = 2**30


def memory() -> int:
    """Bytes of main memory that a process may have."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in LIMITS:
        with suppress(OSError, ValueError):  # no such limit
            found.append(int(Path(path).read_text()))
    return min(found)


def cores() -> int:
    """CPU cores that this process may keep busy: those it may run on, or the quota of a container below them."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([count, *_quotas()]))


def _quotas() -> Iterator[int]:
    """Cores, rounded up, of each quota that holds for this process: of its group, and of those around it."""
    with suppress(OSError, ValueError):  # not Linux
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root = CGROUPS / "cpu" if "cpu" in controllers.split(",") else CGROUPS
            group = root / path.lstrip("/")
            for folder in (group, *group.parents):
                with suppress(OSError, ValueError):  # "max": none
                    quota, period = (folder / "cpu.max").read_text().split()
                    yield math.ceil(int(quota) / int(period))
                with suppress(OSError):
                    quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                    if int(quota) > 0:  # -1: none
                        yield math.ceil(int(quota) / int(period))


def require_memory(size: float, options: Mapping[str, float], why: str = "") -> None:
    """Raise `OptionError` for the largest of the options where `size` bytes, at least, exceed this machine's memory.

    why: what else the size depends on, for the message.
    """
    _require_fits(size, options, why, "of memory", memory())


def require_disk(size: float, options: Mapping[str, float], folder: str | Path, *, free: bool) -> None:
    """Raise `OptionError` for the largest of the options where `size` bytes exceed the disk that has `folder`.

    free: count what is free there now; otherwise, all there is.
    """
    try:
        place = Path(folder).expanduser().absolute()
        while not place.exists():  # to be made
            place = place.parent
        usage = shutil.disk_usage(place)
    except (OSError, RuntimeError, ValueError):  # whoever makes the folder says what is wrong with it
        return
    if usage.total:  # of a disk, not of the kernel's own files
        _require_fits(size, options, "", f"on the disk of {place}", usage.free if free else usage.total)


def _require_fits(size: float, options: Mapping[str, float], why: str, where: str, there: int) -> None:
    if size > there:
        name = max(options, key=lambda name: options[name])
        amount = min(size, 10**30) / GIB  # a float, however large
        needs = f"{amount:,.1f}" if amount < 1e6 else f"{amount:.0e}"
        raise OptionError(name, options[name], f"needs {needs} GiB {where}{why}; there are {there / GIB:,.1f}")
