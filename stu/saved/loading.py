"""A trained model, to be used: its weights, how inputs are read, and what its predictions mean.

B batch, L length, O outputs, C channels

Needs neither Hydra nor Lightning, nor the data or the task that it was trained on: a checkpoint holds the description
of its model, and so does the folder that `stu.export` writes.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from stu.backbone import SequenceModel
from stu.description import MOVED, TARGET, built
from stu.errors import OptionError, brief, require
from stu.files import mapping_in, there
from stu.generation import Sampling, continued
from stu.heads import StepHead
from stu.preconditioning import Preconditioner
from stu.preprocessing import Classes, Label, Numbers, Preprocessing
from stu.preprocessing import Text as Texts
from stu.saved.checkpoints import NAMES, Damaged, Survey, read
from stu.saved.exported import CONFIG, WEIGHTS, assembled, load_weights, read_folder, write_folder
from stu.task import pad

MANIFEST, SUMMARY, CHECKPOINTS = "manifest.json", "summary.json", "checkpoints"  # of a run
PRETRAINING = "pretrain"  # of checkpoints: a phase with a head, and perhaps an encoder, of its own
TASKS = ("data",)  # the package that has the tasks of earlier runs, whose checkpoints do not describe their models


class Prediction(NamedTuple):
    """What a model predicts for one input.

    value: a label, a number or several, (O,) or for each step (L,) or (L, O); the tokens, or the text, predicted at all
    steps. probabilities: of each label, where labels are predicted for the whole input.
    """

    value: Any
    probabilities: dict[Label, float] | None = None


class Trained:
    """A trained `SequenceModel` in eval mode, with its preprocessing.

    task: name (of its class), seq_len (the longest input) and causal; columns, where the inputs were read from columns
    of a table, and steps, where a row of it is one; precondition, where the model predicts a combination of outputs.
    about: what is known of its training: results on the test set, baselines, versions. preprocessing: None where
    inputs are arrays as the model takes them, (L,) or (L, C), and predictions real numbers.
    """

    def __init__(
        self,
        model: SequenceModel,
        preprocessing: Preprocessing | None,
        task: Mapping[str, Any],
        about: Mapping[str, Any],
    ) -> None:
        self.model, self.preprocessing = model.eval(), preprocessing
        self.task, self.about = dict(task), dict(about)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def reads_text(self) -> bool:
        """Whether inputs are texts; numbers otherwise."""
        return self.preprocessing is not None and isinstance(self.preprocessing.inputs, Texts)

    @property
    def predicts_steps(self) -> bool:
        """Whether there is a prediction at every step."""
        return isinstance(self.model.head, StepHead)

    @property
    def _start(self) -> int | None:
        """The token that stands before every sequence, where there is one."""
        return (self.task.get("next_token") or {}).get("start")

    @property
    def labels(self) -> tuple[Label, ...]:
        """The labels, where they are predicted."""
        targets = self.preprocessing.targets if self.preprocessing else None
        return targets.labels if isinstance(targets, Classes) else ()

    def predict(self, inputs: Sequence[Any], *, batch_size: int = 32) -> list[Prediction]:
        """A prediction for each input; inputs are as `preprocessing.inputs` takes them, of any lengths up to seq_len.

        Where a token starts every sequence, as in the training of `language`, it is put before each input, which may
        then have seq_len − 1 steps; the prediction at step t is the next token after x_0 … x_t. Padding changes no
        prediction. Of a preconditioned forecast, predictions are the next steps themselves. Raises `OptionError` for
        an input that is none, or too long, and says which, and where predictions need outputs that are not among the
        inputs.
        """
        require(batch_size >= 1, "batch_size", batch_size, "must be at least 1")
        single = isinstance(inputs, str | bytes)
        require(not single, "inputs", brief(inputs), "must be a list of inputs; of one input, a list of one")
        arrays = []
        for number, value in enumerate(inputs):
            try:
                arrays.append(self.encoded(value))
            except OptionError as error:
                raise OptionError(f"inputs[{number}]", error.value, error.allowed) from error
        starts = range(0, len(arrays), batch_size)
        return [one for start in starts for one in self.predict_encoded(arrays[start : start + batch_size])]

    def encoded(self, value: Any) -> np.ndarray:
        """One input as an array of the model, (L,) tokens or (L, C) numbers. Raises `OptionError` for what is none."""
        array: np.ndarray = np.asarray(value) if self.preprocessing is None else self.preprocessing.inputs.encode(value)
        require(array.dtype.kind in "biuf", "input", brief(value), "must be numbers")
        if array.dtype.kind == "f" or array.ndim == 2:
            array = array.astype(np.float32)
        longest, origin = self.task["seq_len"], "seq_len"
        if self._start is not None:
            longest, origin = longest - 1, "seq_len, less the token that starts a sequence"
        steps = len(array) if array.ndim else 0
        allowed = f"must have 1 to {longest}, as in training ({origin})"
        if self.predicts_steps:
            allowed += "; cut longer ones into pieces, where a row is a step by a column that numbers them (--sequence)"
        require(1 <= steps <= longest, "input", f"{steps} steps", allowed)
        return array

    def predict_encoded(self, arrays: Sequence[np.ndarray]) -> list[Prediction]:
        """The predictions for inputs that are encoded already, in one batch."""
        start = self._start
        inputs, mask = pad(arrays if start is None else [np.insert(array, 0, start, axis=0) for array in arrays])
        with torch.no_grad():
            outputs = self.model(inputs.to(self.device), None if mask is None else mask.to(self.device))
        fits = len(outputs) == len(arrays)
        allowed = "must be read in another way: this model predicts from several inputs at once; call .model itself"
        require(fits, "inputs", len(arrays), allowed)
        outputs = self._restored(outputs.cpu(), inputs)
        if start is not None:
            outputs = outputs[:, 1:]  # the first one predicts x_0
        return [self._meant(output, len(array)) for output, array in zip(outputs, arrays, strict=True)]

    def generate(self, prompt: Any = "", **sampling: Any) -> Iterator[str]:
        """Continue a prompt, where predictions are the next token: pieces of text, some of them empty, as they come.

        sampling: of `stu.generation.Sampling`: max_tokens, temperature, top_k, top_p, seed. Raises `OptionError` where
        predictions are something else, and for a prompt that cannot be read.
        """
        known, next_token = self.preprocessing, self.task.get("next_token")
        possible = known is not None and not isinstance(known.inputs, Numbers) and isinstance(next_token, dict)
        require(possible, "task", self.task["name"], "generates nothing: its predictions are not the next token")
        assert known is not None
        assert not isinstance(known.inputs, Numbers)
        tokens, alphabet = known.inputs.encode(prompt).tolist(), known.inputs.alphabet
        drawn = continued(self.model, tokens, Sampling(**sampling), start=self._start, alphabet=alphabet)
        return known.inputs.pieces(drawn)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write model, preprocessing and a card into a folder, which `stu.load` reads anywhere; see `stu.export`.

        Raises `OptionError` where the folder is there already, unless it holds an exported model and is to be replaced.
        """
        kept = None if self.preprocessing is None else self.preprocessing.as_dict()
        write_folder(Path(folder), self.model, kept, self.task, self.about, overwrite=overwrite)

    def _restored(self, outputs: Tensor, inputs: Tensor) -> Tensor:
        """The outputs themselves, (B, L, O), where the model predicts a combination of them and those before."""
        kept = self.task.get("precondition")
        if kept is None:
            return outputs
        allowed = (
            "predictions need the outputs before, which are no inputs; .model itself predicts a combination of both"
        )
        require(kept["inputs"], "precondition", kept["polynomial"], allowed)
        before = nn.functional.pad(inputs[:, 1:, : outputs.shape[2]], (0, 0, 0, 1))  # y_t is the next input
        return outputs - Preconditioner(kept["polynomial"], kept["degree"]).past(before)

    def _meant(self, output: Tensor, length: int) -> Prediction:
        """One output, (O,) or (L, O), as the user reads it."""
        per_step = output.ndim == 2
        values = (output[:length] if per_step else output).double().numpy()
        targets = self.preprocessing.targets if self.preprocessing else None
        if isinstance(targets, Classes):
            shares = torch.from_numpy(values).softmax(-1).numpy()
            labels = [targets.decode(int(one)) for one in np.atleast_1d(values.argmax(-1))]
            if per_step:
                return Prediction(labels)
            return Prediction(labels[0], dict(zip(targets.labels, shares.tolist(), strict=True)))
        if targets is None or isinstance(targets, Numbers):
            if targets is not None:  # O is C, or C for each of several steps ahead
                ahead = values.reshape(*values.shape[:-1], -1, targets.channels)
                values = targets.decode(ahead).reshape(values.shape)
            return Prediction(_unpacked(values, per_step))
        known = targets.alphabet  # as in generation, no other token is predicted
        best = values[..., known.start : known.stop].argmax(-1) + known.start
        return Prediction(targets.decode(np.atleast_1d(best).tolist()))


def load(run_or_folder: str | Path, *, device: str = "cpu", trust: Sequence[str] = ()) -> Trained:
    """The model of a run (its best weights), of one of its checkpoints, or of an exported folder, ready for use.

    A folder that has exactly one run, such as a sweep of one, stands for it. trust: packages besides stu whose classes
    may be called, for models with parts of one's own; exported folders of strangers can call nothing else. Raises
    `OptionError` for what holds no model, or a damaged one.
    """
    path = there(run_or_folder)
    if path is None:
        raise OptionError("run", str(run_or_folder)[:200], "no such run or folder")
    place = _device(device)
    if path.is_file():
        known = path.suffix in (".ckpt", ".safetensors")
        require(known, "run", path, "must be a run directory, a checkpoint, or a folder that stu.export wrote")
        path = path.parent if path.suffix == ".safetensors" else path
    elif not (path / CONFIG).exists() and not _is_run(path):
        path = _only_run(path)
    loaded = _checkpoint(path, trust) if path.is_file() or _is_run(path) else _exported(path, trust)
    loaded.model.to(place)
    return loaded


def _exported(folder: Path, trust: Sequence[str]) -> Trained:
    found = (folder / CONFIG).is_file() or (folder / WEIGHTS).is_file()
    require(found, "run", folder, "holds no run, and no model that stu.export wrote")
    return Trained(*read_folder(folder, trust))


def _is_run(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() or any((folder / CHECKPOINTS / name).is_file() for name in NAMES)


def _only_run(folder: Path) -> Path:
    """The one run somewhere below a folder, or the folder itself where there is none."""
    found = {path.parent.relative_to(folder) for path in folder.rglob(MANIFEST)}
    runs = sorted(run for run in found if not any(part.startswith(".") for part in run.parts))
    shown = ", ".join(map(str, runs[:3])) + " …" * (len(runs) > 3)
    require(len(runs) <= 1, "run", folder, f"holds {len(runs)} runs, name one of them: {shown}")
    return folder / runs[0] if runs else folder


def _checkpoint(path: Path, trust: Sequence[str]) -> Trained:
    """The model of a run, or of one of its checkpoints."""
    file = path if path.is_file() else _best(path)
    run = file.parent.parent if path.is_file() else path
    try:
        checkpoint = read(file)
    except (Damaged, OSError) as error:
        raise OptionError("checkpoint", file, f"cannot be read: {error}") from error
    weights, trained = checkpoint.get("state_dict"), checkpoint.get("trained")
    require(isinstance(weights, Mapping), "checkpoint", file, "has no weights of a run")
    assert isinstance(weights, Mapping)
    model = {str(name)[len("model.") :]: x for name, x in weights.items() if str(name).startswith("model.")}
    manifest, summary = mapping_in(run / MANIFEST) or {}, mapping_in(run / SUMMARY) or {}
    about = _about(run, manifest, summary) if file.name == NAMES[1] and manifest else {}
    if not isinstance(trained, Mapping) or isinstance(trained.get("model"), str):
        told = "is of pretraining, whose model fills in hidden inputs; the trained one is in the folder above"
        require(file.parent.name != PRETRAINING, "checkpoint", file, told)
        reason = "" if not isinstance(trained, Mapping) else f" ({trained['model']})"
        return Trained(*_of_settings(file, manifest.get("settings"), model, reason, trust), about)
    return Trained(*assembled(trained, model, str(file), trust), about)


def _best(run: Path) -> Path:
    """The best checkpoint of a run, or another whole file of the same weights."""
    survey = Survey(run / CHECKPOINTS)
    if survey.best is None:
        reason = survey.damages or "no validation has chosen its best weights yet, or they are missing"
        others = "".join(f"; its latest weights are in {state.path}" for state in survey.whole[:1])
        raise OptionError("run", run, f"has no best checkpoint: {reason}{others}")
    return survey.best.path


def _about(run: Path, manifest: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a card says of a finished run."""
    start = (manifest.get("starts") or [{}])[-1]
    known = {key: summary[key] for key in ("test", "best", "baselines", "steps", "parameters") if key in summary}
    made = {key: start[key] for key in ("packages", "git", "python") if start.get(key)}
    script, *words = shlex.split(start.get("command") or "train.py")
    made["command"] = f"python {shlex.join([Path(script).name, *words])}"  # not where this machine has it
    return {"run": "/".join(run.absolute().parts[-3:]), **known, **made}


def _of_settings(
    file: Path, settings: Any, weights: Mapping[str, Tensor], reason: str, trust: Sequence[str]
) -> tuple[SequenceModel, Preprocessing | None, dict[str, Any]]:
    """The model of a checkpoint that does not describe it, from the settings of its run and the task itself."""
    known = isinstance(settings, dict) and all(isinstance(settings.get(key), dict) for key in ("task", "model"))
    missing = f"does not describe its model{reason}, and {MANIFEST} of its run, which has the settings, is damaged"
    require(known, "checkpoint", file, f"{missing} or absent")
    trusted = (*TASKS, *trust)
    options = {key: value for key, value in settings["task"].items() if key != "test_lengths"}
    task = built(_relocated(options), trusted)
    if combined := settings.get("precondition"):
        task.precondition(Preconditioner(combined["polynomial"], combined["degree"]))
    backbone = built({**_relocated(settings["model"]), "compile": False}, trusted)
    model = SequenceModel(task.encoder(backbone.d_model), backbone, task.head(backbone.d_model))
    load_weights(model, weights, str(file))
    return model, task.preprocessing, task.facts()


def _relocated(node: Any) -> Any:
    """A node of a configuration with the present names of modules."""
    if isinstance(node, list):
        return [_relocated(item) for item in node]
    if not isinstance(node, dict):
        return node
    values = {key: _relocated(value) for key, value in node.items()}
    if TARGET in values:
        module, _, name = str(values[TARGET]).rpartition(".")
        values[TARGET] = f"{MOVED.get(module, module)}.{name}"
    return values


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError("device", name, f"is not available: {str(error).splitlines()[0]}") from error
    return device


def _unpacked(values: np.ndarray, per_step: bool) -> Any:
    """Without the last axis where there is one output; a single number as such."""
    if values.shape[-1] == 1:
        values = values[..., 0]
    return values if values.ndim else float(values)
