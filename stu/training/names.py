"""What a run is called: from the overrides of its command, so that the same command finds it again."""

import hashlib
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from stu.errors import require

# Keys that do not change what is computed: they may differ when a run is resumed. `model.compile` changes the rounding,
# as does another machine; a run of compiled blocks can so be resumed and tested where there is no compiler.
FREE_KEYS = (
    "mode",
    "overwrite",
    "checkpoint",
    "prompt",
    "generate",
    "logger",
    "paths",
    "name",
    "checkpoints.every_minutes",
    "loader.num_workers",
    "loader.device_resident",
    "figures",
    "pictures",  # what earlier runs call figures
    "task.data.dir",
    "task.test_lengths",
    "model.compile",
)
FOLDERS = ("model", "task")  # choices that name the folders above a run
LONGEST_NAME = 240  # bytes: file systems take 255, of which the names of lock and temporary files need some
LONGEST, SHOWN = 100, 88  # characters of a name that is made, and of one that ends in a hash
SHORTENED = re.compile(r"^(model\.mixers\.(?=\w+\.\w+=)|[\w.@/]*\.(?=\w+=))")  # of a key; a layer's name stays
DIGEST = re.compile(r"-[0-9a-f]{10}")


def is_free(key: str) -> bool:
    """Whether a configuration key may change between the starts of one run."""
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)


def require_plain(name: str) -> None:
    """Raise `OptionError` unless a run can be called so: the name of a plain folder."""
    plain = name.strip() == name != "" and name[0] != "." and name.isprintable() and not set(name) & set("/\\")
    require(plain, "name", repr(name), "must be a plain folder name that does not start with a dot")
    size = len(os.fsencode(name))
    require(size <= LONGEST_NAME, "name", f"{name[:40]}…", f"has {size} bytes; at most {LONGEST_NAME} are a name")


def run_name(overrides: Sequence[str], swept: Collection[str] = ()) -> str:
    """A folder name from command-line overrides, so that the same command finds its run again.

    The choices that name the folders above, and keys that do not change the result, are left out. Where all others do
    not fit, those of the keys `swept` stand first, then the rest by the last parts of their keys, cut off; a hash of
    all overrides, which does not depend on what is swept, tells such names apart.
    """
    kept = {o.lstrip("+"): key for o in overrides if is_telling(key := key_of(o)) and key not in FOLDERS}
    name = ",".join(sorted(kept)) or "default"
    if _safe(name) == name and len(name) <= LONGEST:
        return name
    first = [override for override in sorted(kept) if kept[override] in swept]
    rest = [override for override in sorted(kept) if kept[override] not in swept]
    shown = _safe(",".join([*first, *(re.sub(SHORTENED, "", override) for override in rest)]))
    return f"{shown[:SHOWN]}-{hashlib.sha256(name.encode()).hexdigest()[:10]}"  # others may be simplified to the same


def known_as(parent: Path, name: str) -> str:
    """What the run `name`, made by `run_name`, is called in the folder `parent`: another command may have named it."""
    if not (digest := DIGEST.fullmatch(name[-11:])) or (parent / name).exists() or not parent.is_dir():
        return name
    return min((n for n in os.listdir(parent) if n.endswith(digest[0]) and n[0] != "."), default=name)


def key_of(override: str) -> str:
    """`+optimizer@x=y` → optimizer."""
    return override.split("=", 1)[0].lstrip("+~").split("@", 1)[0]


def is_telling(key: str) -> bool:
    """Whether the overrides of a key belong into the name of a run."""
    return not is_free(key) and not key.startswith("hydra")


def _safe(name: str) -> str:
    return "".join(c if (c.isascii() and c.isalnum()) or c in "=,.-_+" else "-" for c in name)
