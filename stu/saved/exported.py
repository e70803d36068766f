"""A trained model as one folder that anybody can load: `python -m stu.export` writes it, `stu.load` reads it.

    model.safetensors   the weights, which are numbers and nothing else
    config.json         the calls that make the model, how inputs are read, facts of task and training
    README.md           a card for readers

Loading calls the parts of models that stu has, with keywords that they have, and nothing else; no size is believed that
the weights do not have. So a folder may come from strangers.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stu.backbone import SequenceModel
from stu.description import TARGET, built, loose, strict
from stu.errors import OptionError, brief, require
from stu.files import PARTIAL, mapping_in, put_in_place, replace_folder
from stu.preconditioning import Preconditioner
from stu.preprocessing import Classes, Numbers, Preprocessing
from stu.structure import KEY

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FORMAT, VERSION = "stu", 1
LARGEST_CONFIG = 2**26  # bytes: vocabularies may be long
SMALL = 1024  # whole numbers up to this are believed
LONGEST = 2**22  # steps
DEEPEST = 100  # calls and lists within each other
MOST_FILTERED = 2**26  # numbers of all filters of a layer: seq_len of each
LENGTHS = ("seq_len", "window", "chunk_size")  # keywords that count steps, which no weights need have


# Writing


def write_folder(
    folder: Path,
    model: SequenceModel,
    preprocessing: Mapping[str, Any] | None,
    task: Mapping[str, Any],
    about: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Write the folder, whole or not at all. Raises `OptionError` where it is there, or nothing describes the model."""
    safetensors = _safetensors()
    calls = model.description
    require(not isinstance(calls, str), "model", type(model).__name__, f"cannot be described: {calls}")
    folder = Path(os.path.abspath(folder.expanduser()))
    present = folder.exists() or folder.is_symlink()
    replaced = present and overwrite and _is_exported(folder)
    advice = "holds something else than an exported model" if overwrite else "exists; choose another, or overwrite it"
    require(not present or replaced, "folder", folder, advice)
    config = {"format": FORMAT, "version": VERSION, "task": dict(task), "model": calls}
    config |= {"preprocessing": preprocessing, "about": dict(about)}
    partial = folder.with_name(f".{folder.name}{PARTIAL}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        # copies: tensors that share their memory are written once each, and read into the same place
        weights = {name: x.detach().cpu().contiguous().clone() for name, x in model.state_dict().items()}
        safetensors.save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(strict(config), indent=1, ensure_ascii=False, allow_nan=False)
        (partial / CONFIG).write_text(text + "\n", encoding="utf-8")
        (partial / CARD).write_text(card(model, task, about, preprocessing), encoding="utf-8")
        (replace_folder if replaced else put_in_place)(partial, folder)
    except OSError as error:
        raise OptionError("folder", folder, f"cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_exported(folder: Path) -> bool:
    """Whether a folder holds an exported model, and nothing else that would be lost with it."""
    if folder.is_symlink() or not {CONFIG, WEIGHTS} <= (names := {path.name for path in folder.glob("*")}):
        return False
    config = mapping_in(folder / CONFIG, json.loads) or {}
    return names <= {CONFIG, WEIGHTS, CARD} and config.get("format") == FORMAT


def card(model: SequenceModel, task: Mapping[str, Any], about: Mapping[str, Any], preprocessing: Any) -> str:
    """What a reader should know of the model, in Markdown."""
    mixers = dict.fromkeys(type(block.mixer).__name__ for block in model.backbone.blocks)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    inputs = "arrays as the model takes them" if preprocessing is None else preprocessing["inputs"]["kind"]
    lines = [
        f"# {', '.join(mixers)} on {task['name']}\n",
        '```python\nimport stu\n\nloaded = stu.load("THIS FOLDER")\nloaded.predict([…])\n```\n',
        "| | |\n| --- | --- |",
        f"| parameters | {parameters:,} |",
        f"| blocks, width | {len(model.backbone.blocks)}, {model.backbone.d_model} |",
        f"| longest input | {task['seq_len']:,} steps |",
        f"| inputs | {inputs} |",
        *(f"| precondition | {kept} |" for kept in [_preconditioned(task)] if kept),
        *(f"| test {name} | {value:.6g} |" for name, value in _numbers(about.get("test"))),
        *(f"| baseline: {name} | {value:.6g} |" for name, value in _numbers(about.get("baselines"))),
        *(f"| {name} | `{about[name]}` |" for name in ("run", "command") if name in about),
        *(f"| {name} | {version} |" for name, version in _items(about.get("packages"))),
    ]
    return "\n".join(lines) + "\n"


def _preconditioned(task: Mapping[str, Any]) -> str:
    kept = task.get("precondition")
    return f"{kept['polynomial']}, degree {kept['degree']}" if kept else ""


def _numbers(values: Any) -> list[tuple[str, float]]:
    return [(name, value) for name, value in _items(values) if isinstance(value, int | float)]


def _items(values: Any) -> list[tuple[str, Any]]:
    """Of a mapping; nothing of what a stranger has written in its place."""
    return list(values.items()) if isinstance(values, Mapping) else []


# Reading


def read_folder(
    folder: Path, trust: Sequence[str] = ()
) -> tuple[SequenceModel, Preprocessing | None, dict[str, Any], dict[str, Any]]:
    """Model, preprocessing, facts of the task and of its training. Raises `OptionError` where the folder is damaged."""
    config, file = _config(folder / CONFIG), folder / WEIGHTS
    safetensors = _safetensors()
    try:
        weights = safetensors.load_file(file)
    except Exception as error:  # of many kinds
        raise OptionError(WEIGHTS, file, f"is missing or damaged: {_line(error)}") from error
    about = config.get("about", {})
    require(isinstance(about, dict), f"{CONFIG}: about", brief(about), "must be a mapping")
    return *assembled(config, weights, str(folder), trust), loose(about)


def assembled(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], source: str, trust: Sequence[str]
) -> tuple[SequenceModel, Preprocessing | None, dict[str, Any]]:
    """Model, preprocessing and facts of the task, of a checkpoint or an exported folder.

    config: how the model is made (`model`), `preprocessing` and `task`. Raises `OptionError` where they do not fit.
    """
    require(_depth(config) <= DEEPEST, "model", source, f"is nested more than {DEEPEST} deep")
    _require_facts(config.get("task"), source)
    kept = config.get("preprocessing")
    require(kept is None or isinstance(kept, Mapping), "preprocessing", brief(kept), f"{source} must have a mapping")
    preprocessing = None if kept is None else Preprocessing.read(kept)
    model = fitted(config.get("model"), weights, source, trust)
    _require_fit(model, preprocessing, config["task"], source)
    return model, preprocessing, dict(config["task"])


def _depth(value: Any) -> int:
    """How deep plain data are nested."""
    depth, level = 0, [value]
    while level:
        parts = [part for part in level if isinstance(part, Mapping | list)]
        level = [item for part in parts for item in (part.values() if isinstance(part, Mapping) else part)]
        depth += 1
    return depth


def _require_facts(task: Any, source: str) -> None:
    kinds = {"name": str, "seq_len": int, "causal": bool}
    facts = task if isinstance(task, Mapping) else {}
    wrong = next((name for name, kind in kinds.items() if type(facts.get(name)) is not kind), None)
    require(wrong is None, f"task.{wrong}", brief(facts.get(str(wrong))), f"{source} is damaged")
    start = facts.get("next_token", {"start": None})
    known = isinstance(start, Mapping) and type(start.get("start")) in (int, type(None))
    require(known, "task.next_token", brief(start), f"{source} is damaged")
    steps = facts.get("steps", {})
    named = isinstance(steps, Mapping) and all(isinstance(name, str | None) for name in steps.values())
    require(named, "task.steps", brief(steps), f"{source} is damaged")
    columns = facts.get("columns", [])
    named = isinstance(columns, list) and all(isinstance(name, str) for name in columns)
    require(named, "task.columns", brief(columns), f"{source} is damaged: they must be a list of texts")
    kept = facts.get("precondition")
    if kept is not None:
        complete = isinstance(kept, Mapping) and set(kept) == {"polynomial", "degree", "inputs"}
        typed = complete and isinstance(kept["polynomial"], str) and type(kept["degree"]) is int
        require(typed, "task.precondition", brief(kept), f"{source} is damaged")
        Preconditioner(kept["polynomial"], kept["degree"])
    length = facts["seq_len"]
    require(1 <= length <= LONGEST, "task.seq_len", brief(length), f"must be 1 to {LONGEST:,}")


def fitted(calls: Any, weights: Mapping[str, Tensor], source: str, trust: Sequence[str]) -> SequenceModel:
    """The model that these calls make, in float32, with these weights. Raises `OptionError` where they do not fit.

    It is made without memory first, so that nothing of another size than the weights is.
    """
    complete = isinstance(calls, Mapping) and set(calls) == set(PARTS)
    require(complete, "model", source, f"must have {', '.join(PARTS)}, and nothing else")
    _require_sizes(calls, weights)
    try:
        with _defaults("meta"):
            own = _model(calls, trust).state_dict()
        _require_same(own, weights, source)
        with _defaults("cpu"), torch.random.fork_rng(devices=[]):
            model = _model(calls, trust)
    except OptionError:
        raise
    except Exception as error:  # whatever constructors raise, given anything
        raise OptionError("model", source, f"cannot be made as it says: {_line(error)}") from error
    load_weights(model, weights, source)
    odd = [name for name, x in weights.items() if not bool(x.isfinite().all())]
    if odd:
        warnings.warn(f"{source}: {odd[0]} has values that are not finite, and so will predictions", stacklevel=2)
    return model


@contextmanager
def _defaults(device: str) -> Iterator[None]:
    """Make float32 tensors on this device, whatever the user's defaults are."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def load_weights(model: SequenceModel, weights: Mapping[str, Tensor], source: str) -> None:
    """Load all weights of the model. Raises `OptionError` where they are of another one."""
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise OptionError(
            "weights", source, f"belong to another model: {str(error).splitlines()[1].strip()}"
        ) from error


PARTS = {"encoder": "stu.encoders", "backbone": "stu.backbone", "head": "stu.heads"}  # and where stu has them


def _model(calls: Mapping[str, Any], trust: Sequence[str]) -> SequenceModel:
    parts = {}
    for name, home in PARTS.items():
        call = calls[name]
        target = str(call.get(TARGET)) if isinstance(call, Mapping) else ""
        fits = target.rpartition(".")[0] == home or target.partition(".")[0] in trust
        require(fits, f"model.{name}", brief(target), f"must be of {home}")
        parts[name] = built({**call, "compile": False} if name == "backbone" else call, trust)
    return SequenceModel(**parts)


def _config(file: Path) -> dict[str, Any]:
    try:
        require(file.stat().st_size <= LARGEST_CONFIG, CONFIG, file, f"is larger than {LARGEST_CONFIG >> 20} MiB")
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(CONFIG, file, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise OptionError(CONFIG, file, f"is no JSON: {brief(error)}") from error
    ours = isinstance(config, dict) and config.get("format") == FORMAT
    require(ours, CONFIG, file, "is not of a model that stu.export wrote")
    version = config.get("version")
    require(version == VERSION, f"{CONFIG}: version", version, f"must be {VERSION}; a newer stu wrote it")
    return config


def _require_sizes(calls: Any, weights: Mapping[str, Tensor]) -> None:
    """Raise `OptionError` for whole numbers that are far above all sizes of the weights, before anything is made."""
    largest = max([SMALL, *(2 * size for x in weights.values() for size in x.shape)])
    for name, number in _whole_numbers("", calls):
        most = LONGEST if name in LENGTHS else largest
        require(abs(number) <= most, name, number, f"must be at most {most:,}, for weights of these sizes")
    for filters, length in _filtered(calls):
        allowed = f"must be at most {MOST_FILTERED // max(1, length):,}, for filters of seq_len={length}"
        require(filters * length <= MOST_FILTERED, "num_filters", filters, allowed)


def _whole_numbers(name: str, value: Any) -> Iterator[tuple[str, int]]:
    """All whole numbers in plain data, with the keywords under which they stand."""
    if isinstance(value, Mapping | list):
        for key, part in value.items() if isinstance(value, Mapping) else [(name, item) for item in value]:
            yield from _whole_numbers(str(key), part)
    elif isinstance(value, int):
        yield name, value


def _filtered(value: Any) -> Iterator[tuple[int, int]]:
    """num_filters and seq_len of all calls in plain data that have both."""
    if isinstance(value, Mapping):
        filters, length = value.get("num_filters"), value.get("seq_len")
        if isinstance(filters, int) and isinstance(length, int):
            yield filters, length
    if isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _filtered(part)


def _require_same(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> None:
    """Raise `OptionError` where the weights have other names or shapes than those of the model."""
    for name in {**own, **weights}:
        if name.endswith(KEY):  # which `load_state_dict` compares
            continue
        before = tuple(weights[name].shape) if name in weights else "missing"
        now = tuple(own[name].shape) if name in own else "unknown to it"
        require(before == now, name, before, f"{source} does not fit its model, in which it is {now}")


def _require_fit(
    model: SequenceModel, preprocessing: Preprocessing | None, task: Mapping[str, Any], source: str
) -> None:
    """Raise `OptionError` where inputs or predictions are read in another way than the model takes and makes them."""
    if preprocessing is None:
        return
    inputs, targets = preprocessing
    try:
        if isinstance(inputs, Numbers):
            trial = torch.zeros(2, 1, inputs.channels, dtype=torch.float32)
        else:
            trial = torch.full((2, 1), inputs.vocab_size - 1)
        with torch.no_grad():
            predicted = model.eval()(trial).shape  # (B, O) or (B, L, O)
    except Exception as error:  # whatever PyTorch raises, given anything
        raise OptionError("preprocessing.inputs", source, f"does not fit the model: {_line(error)}") from error
    start, outputs = task.get("next_token", {}).get("start"), predicted[-1]
    if start is not None:
        known = not isinstance(inputs, Numbers) and 0 <= start < inputs.vocab_size and len(predicted) == 3
        require(known, "task.next_token", brief(start), f"{source}: must be a token, and one predicted at every step")
    if targets is None:
        return
    if isinstance(targets, Numbers):
        expected = targets.channels
        fits = outputs % expected == 0  # of one step ahead, or of several
    elif isinstance(targets, Classes):
        expected = len(targets.labels)
        fits = outputs == expected
    else:
        expected = targets.vocab_size
        fits = outputs > targets.alphabet.start  # there may be more outputs than tokens, which are not predicted
    require(fits, "preprocessing.targets", source, f"is of {expected} values, the model has {outputs} outputs")


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def _safetensors() -> Any:
    try:
        import safetensors.torch

        return safetensors.torch
    except ImportError as error:
        raise OptionError("export", WEIGHTS, 'needs safetensors: pip install "stu[export]"') from error
