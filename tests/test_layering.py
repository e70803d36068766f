"""Who may import whom: the arrows of the design, read from the source. And what must not be written twice."""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for folder in ("stu", "data", "experiments") for path in (ROOT / folder).rglob("*.py"))
# Distributions of the `train` extra by what one imports: a library user has none of them.
TRAINING_ONLY = {
    "lightning",
    "hydra",
    "omegaconf",
    "torchmetrics",
    "wandb",
    "datasets",
    "filelock",
    "pyarrow",
    "yaml",
    "rich",
    "PIL",
}
ABOVE = {"data", "experiments", "conf", "train", "tests"}
HYDRA = {"hydra", "omegaconf"}
SHORT = 25  # nodes of a syntax tree: a statement with fewer may occur in many methods
COMMANDS = ("data/prepare/__main__.py",)  # like train.py, they see all


def module_of(path: Path) -> str:
    """stu/ops/filters.py → stu.ops.filters."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path, *, for_types_too: bool = True) -> set[str]:
    """Absolute names of all that a file imports, wherever in the file: stu.ops.filters.Hankel counts as such."""
    return set(_imports(parsed(path), for_types_too))


def _imports(node: ast.AST, for_types_too: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, "relative imports are not used here"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING" and not for_types_too:
            continue
        else:
            yield from _imports(child, for_types_too)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def ours(path: Path) -> set[str]:
    """What a file imports from the library."""
    return {name for name in imports(path) if within(name, "stu")}


def under(*places: str) -> list:
    """The files in these folders, or these files, as test parameters."""
    wanted = [ROOT / place for place in places]
    found = [path for path in FILES if any(place == path or place in path.parents for place in wanted)]
    assert found, f"nothing lies in {places}"
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in found]


def test_the_reader_of_imports_sees_them_all(tmp_path: Path):
    file = tmp_path / "file.py"
    file.write_text(
        "import a.b as c\nfrom d import e, f\nif TYPE_CHECKING:\n    import g\ndef h():\n    from i.j import k\n"
        "try:\n    import l\nexcept ImportError:\n    pass\n"
    )
    assert imports(file) == {"a.b", "d.e", "d.f", "g", "i.j.k", "l"}
    assert imports(file, for_types_too=False) == {"a.b", "d.e", "d.f", "i.j.k", "l"}


@pytest.mark.parametrize("path", under("stu"))
def test_the_library_sees_nothing_above_it(path: Path):
    assert {name for name in imports(path) if within(name, *ABOVE)} == set()


@pytest.mark.parametrize("path", [p for p in under("stu") if not within(p.id.replace("/", "."), "stu.cli")])
def test_hydra_is_known_to_the_command_line_alone(path: Path):
    assert {name for name in imports(path) if within(name, *HYDRA, "stu.cli")} == set()


@pytest.mark.parametrize(
    "path", [p for p in under("stu") if not within(p.id.replace("/", "."), "stu.training", "stu.cli")]
)
def test_what_only_training_needs_is_imported_only_there(path: Path):
    found = {name for name in imports(path, for_types_too=False) if within(name, *TRAINING_ONLY)}
    if path == ROOT / "stu/task.py":  # the metrics of a task are made when training starts
        found = {name for name in found if not within(name, "torchmetrics")}
    if path.parent == ROOT / "stu/tables":  # who reads tables has what reads them
        found = {name for name in found if not within(name, "pyarrow", "datasets")}
    assert found == set()
    assert {name for name in imports(path) if within(name, "lightning", "stu.training")} == set()


@pytest.mark.parametrize("path", under("stu/ops"))
def test_operations_rest_on_nothing(path: Path):
    assert {name for name in ours(path) if not within(name, "stu.ops", "stu.errors", "stu.files")} == set()


@pytest.mark.parametrize("path", under("stu/reference"))
def test_references_know_nothing_of_what_is_tested_against_them(path: Path):
    assert {name for name in ours(path) if not (within(name, "stu.reference") or name.endswith("_reference"))} == set()


@pytest.mark.parametrize("path", under("stu/mixers"))
def test_a_mixer_knows_neither_the_stack_nor_the_task(path: Path):
    forbidden = ("stu.backbone", "stu.task", "stu.heads", "stu.norm", "stu.channel", "stu.reference")
    assert {name for name in ours(path) if within(name, *forbidden)} == set()


@pytest.mark.parametrize(
    "path", under("stu/backbone.py", "stu/mixer.py", "stu/task.py", "stu/heads.py", "stu/encoders.py")
)
def test_interfaces_know_no_mixer(path: Path):
    assert {name for name in ours(path) if within(name, "stu.mixers")} == set()


@pytest.mark.parametrize("path", under("stu/task.py", "stu/heads.py", "stu/encoders.py"))
def test_a_task_knows_no_model(path: Path):
    assert {name for name in ours(path) if within(name, "stu.backbone", "stu.mixer", "stu.channel")} == set()


@pytest.mark.parametrize("path", under("stu/training"))
def test_training_knows_no_mixer(path: Path):
    found = {name for name in ours(path) if within(name, "stu.mixers", "stu.mixer", "stu.ops")}
    assert {name for name in found if not within(name, "stu.ops.transfer")} == set()  # which computes nothing


@pytest.mark.parametrize("path", [p for p in under("data") if p.id not in COMMANDS])
def test_data_sees_what_a_task_is_made_of(path: Path):
    parts = ("task", "encoders", "heads", "errors", "files", "locks", "preprocessing", "resources", "tables")
    allowed = [f"stu.{part}" for part in parts]
    assert {name for name in ours(path) if not within(name, *allowed)} == set()
    assert {name for name in imports(path) if within(name, "lightning", "conf", "train", *HYDRA)} == set()


@pytest.mark.parametrize("path", under("stu/cli"))
def test_the_command_line_knows_neither_models_nor_training(path: Path):
    assert {name for name in ours(path) if not within(name, "stu.cli", "stu.errors")} == set()
    assert {name for name in imports(path) if within(name, "lightning")} == set()


def test_configurations_are_yaml_alone():
    assert {
        path.suffix for path in (ROOT / "conf").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    } == {".yaml"}


def test_no_imports_run_in_circles():
    modules = {module_of(path): path for path in FILES}
    arrows = {
        name: {target for found in imports(path) if (target := owner(found, modules)) and target != name}
        for name, path in modules.items()
    }
    while leaves := {name for name, targets in arrows.items() if not targets & arrows.keys()}:
        arrows = {name: targets for name, targets in arrows.items() if name not in leaves}
    assert arrows == {}


def owner(name: str, modules: dict[str, Path]) -> str | None:
    """The file that an imported name comes from: stu.ops.filters for stu.ops.filters.Hankel."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def test_folders_of_data_are_rooms():
    sizes = {folder: len(list(folder.glob("*.py"))) for folder in (ROOT / "data").rglob("*") if folder.is_dir()}
    full = {folder.name: size for folder, size in sizes.items() if size > 8}
    assert full == {}, "at most 8 files per folder of data/: open another one for the next kind of task"


def test_tasks_are_not_copied():
    """No two classes of data/ have a method with the same body, except for one short statement."""
    bodies = defaultdict(list)
    for path in (ROOT / "data").rglob("*.py"):
        for cls in (node for node in ast.walk(parsed(path)) if isinstance(node, ast.ClassDef)):
            for method in (node for node in cls.body if isinstance(node, ast.FunctionDef)):
                statements = [node for node in method.body if not docstring(node)]
                if len(statements) > 1 or sum(1 for part in statements for _ in ast.walk(part)) > SHORT:
                    bodies[ast.dump(ast.Module(statements, []))].append(f"{module_of(path)}.{cls.name}.{method.name}")
    copies = [names for names in bodies.values() if len(names) > 1]
    assert copies == [], "the same body: move it to what both derive from"


def docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


@cache
def kinds() -> set[str]:
    """The names of all tasks, data and mixers."""
    files = [file for file in FILES if within(module_of(file), "stu.mixers", "data")]
    classes = (node.name for file in files for node in ast.walk(parsed(file)) if isinstance(node, ast.ClassDef))
    return {"Task", "Mixer", "Classification", "Regression", *classes}


@pytest.mark.parametrize("path", under("stu"))
def test_no_branches_on_the_kind_of_task_or_mixer(path: Path):
    found = [
        ast.unparse(node)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "hasattr", "issubclass")
        if kinds()
        & {name.id for argument in node.args[1:] for name in ast.walk(argument) if isinstance(name, ast.Name)}
    ]
    assert found == []


@pytest.mark.slow
def test_the_library_imports_without_the_training_extra():
    """Torch, NumPy and SciPy are all that a user of the layers installs."""
    library = [m for m in map(module_of, FILES) if within(m, "stu") and not within(m, "stu.training", "stu.cli")]
    assert len(library) > 10
    code = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({sorted(TRAINING_ONLY)}))\n"  # None: importing it raises
        f"for name in {library}: importlib.import_module(name)\n"
        "import stu\n"
        "print(*(hasattr(stu, name) for name in (*stu.__all__, 'backbone', 'ops', 'mixers')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"True"}


def test_the_training_extra_is_what_the_test_above_does_without():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {"hydra-core": "hydra", "pyyaml": "yaml", "pillow": "PIL"}
    listed = {requirement.split(">=")[0] for requirement in project["optional-dependencies"]["train"]}
    assert {names.get(name, name) for name in listed} == TRAINING_ONLY
    files = [path for path in FILES if not within(module_of(path), "experiments")]
    roots = {name.split(".")[0] for path in files for name in imports(path)} - {"stu", "data"}
    third_party = {name for name in roots if name not in sys.stdlib_module_names}
    base = {requirement.split(">=")[0] for requirement in project["dependencies"]}
    extras = {
        "matplotlib",
        "safetensors",
        "sklearn",
        "tensorboardX",
        "trackio",
    }  # of their own, imported where they are used
    assert third_party - TRAINING_ONLY - extras <= base
