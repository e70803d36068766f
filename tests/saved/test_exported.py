"""Exported models: the same to the last bit, and nothing that a stranger may write is executed, believed or large."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import stu
from stu.description import built, described
from stu.encoders import LinearEncoder, TokenEncoder
from stu.errors import OptionError
from stu.generation import generate
from stu.heads import PooledHead, StepHead
from stu.mixers.stu import STU
from stu.preprocessing import Preprocessing, Text, Tokens
from stu.saved.exported import CONFIG, WEIGHTS, write_folder
from stu.saved.loading import Trained
from tests.models import MODELS, factory, randomized

safetensors = pytest.importorskip("safetensors.torch")
TASK = {"name": "Steps", "seq_len": 12, "causal": True}
NUMBERS = {"inputs": {"kind": "numbers", "mean": [1.0, 2.0], "std": [1.0, 2.0]}, "targets": None}


def small_model(model: str = "stu", *, causal: bool = True) -> stu.SequenceModel:
    """Far from its initialisation, with statistics of some batches."""
    backbone = factory(model, seq_len=12, causal=causal)()
    whole = randomized(stu.SequenceModel(LinearEncoder(8, d_input=2), backbone, PooledHead(8, d_output=3, pool="last")))
    whole.train()(torch.randn(2, 12, 2))
    return whole.eval()


def exported(folder: Path, model: stu.SequenceModel | None = None, preprocessing: Any = NUMBERS) -> Path:
    write_folder(folder, model or small_model(), preprocessing, TASK, {})
    return folder


@pytest.mark.parametrize(
    ("model", "causal"),
    [
        # each model once, and all of them both ways where there is time
        pytest.param(model, causal, marks=[] if causal == bool(number % 2) else pytest.mark.slow)
        for number, model in enumerate(MODELS)
        for causal in (True, False)
    ],
)
def test_every_model_comes_back_to_the_last_bit(tmp_path: Path, model: str, causal: bool):
    before = small_model(model, causal=causal)
    random = torch.get_rng_state()
    after = stu.load(exported(tmp_path / "folder", before)).model
    assert torch.equal(random, torch.get_rng_state())
    assert not after.training
    saved, loaded = before.state_dict(), after.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) and saved[name].dtype == loaded[name].dtype for name in saved)
    x, mask = torch.randn(2, 12, 2), torch.arange(12) < torch.tensor([[12], [7]])
    assert torch.equal(before(x, mask), after(x, mask))


def test_numbers_that_json_does_not_have_are_names(tmp_path: Path):
    """As Mamba-2's limit of its steps; folders that have them as Python writes them are read, too."""
    folder, before = tmp_path / "folder", small_model("mamba2")
    write_folder(folder, before, NUMBERS, TASK, {"test": {"r2": float("nan")}})
    text = (folder / CONFIG).read_text()
    config = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert "Infinity" in text
    assert config["about"] == {"test": {"r2": "NaN"}}
    assert np.isnan(stu.load(folder).about["test"]["r2"])
    (folder / CONFIG).write_text(re.sub('"(NaN|Infinity)"', r"\1", text))
    again = stu.load(folder)
    assert np.isnan(again.about["test"]["r2"])
    assert json.dumps(again.model.description) == json.dumps(before.description)


def test_a_model_made_in_python_is_described():
    """A hybrid, with a number of NumPy, and a class as its channel mixer."""
    mixers = [functools.partial(STU, seq_len=12, num_filters=4), factory("s4", seq_len=12).keywords["mixer"]]
    backbone = stu.Backbone(8, depth=3, mixer=mixers, channel_mixer=stu.channel.GLU, dropout=np.float32(0))
    again = built(json.loads(json.dumps(backbone.description)))
    assert [type(block.mixer).__name__ for block in again.blocks] == ["STU", "S4", "STU"]
    again.load_state_dict(backbone.state_dict())
    assert again.description == backbone.description


def test_tied_tensors_are_loaded_into_one(tmp_path: Path):
    model = stu.SequenceModel(TokenEncoder(8, vocab_size=5), factory("stu", seq_len=12)(), StepHead(8, d_output=5))
    model.head.linear.weight = model.encoder.embedding.weight
    after = stu.load(exported(tmp_path / "folder", model, None)).model
    assert torch.equal(after.head.linear.weight, model.encoder.embedding.weight)


@pytest.mark.parametrize(
    ("backbone", "line"),
    [
        (
            lambda: stu.Backbone(8, depth=1, mixer=lambda d: STU(d, seq_len=12, num_filters=4), channel_mixer=None),
            "backbone: mixer=<function",
        ),
        (nn.Identity, "backbone: Identity is no Described module"),
    ],
)
def test_what_nothing_describes_is_refused(tmp_path: Path, backbone: Any, line: str):
    model = stu.SequenceModel(LinearEncoder(8, d_input=2), backbone(), PooledHead(8, d_output=3))
    with pytest.raises(OptionError, match=line):
        exported(tmp_path / "folder", model)
    assert list(tmp_path.iterdir()) == []


def changed(folder: Path, key: str, value: Any) -> Path:
    """The folder with another value of a key of its configuration, a.b.c."""
    config = json.loads((folder / CONFIG).read_text())
    *names, last = key.split(".")
    node = functools.reduce(lambda node, name: node[name], names, config)
    node[last] = value
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def nested(depth: int) -> Any:
    node: Any = 1
    for _ in range(depth):
        node = {"_target_": "stu.mixers.stu.STU", "_partial_": True, "seq_len": node}
    return node


def call(target: Any, **keywords: Any) -> dict[str, Any]:
    return {"_target_": target, "_partial_": True, **keywords}


MIXER = "model.backbone.mixer"
WRONG = [
    (MIXER, call("os.system", command="touch pwned"), "_target_=os.system: must be a class of stu.backbone"),
    (MIXER, call("subprocess.Popen", args="true"), "_target_=subprocess.Popen"),
    (MIXER, call("builtins.exec"), "_target_=builtins.exec"),
    (MIXER, call("stu.cli.usage.answer"), "_target_=stu.cli.usage.answer"),
    (MIXER, call("stu.files.remove_folder"), "_target_=stu.files.remove_folder"),
    (MIXER, call("stu.mixers.stu.torch.load"), "_target_=stu.mixers.stu.torch.load"),
    (MIXER, call("stu.mixers.stu.__builtins__.exec"), "_target_=stu.mixers.stu.__builtins__"),
    (MIXER, call("stu.mixers.stu.STU.__init__"), "_target_=stu.mixers.stu.STU.__init__"),
    (MIXER, call("stu.mixers..stu.STU"), "_target_=stu.mixers..stu.STU"),
    (MIXER, call("stu.mixers.nothing.STU"), "_target_=stu.mixers.nothing.STU"),
    (MIXER, call("../stu.STU"), "_target_=../stu.STU"),
    (MIXER, call(["stu.STU"]), "_target_=['stu.STU']"),
    (MIXER, call("stu.mixers.stu.require"), "_target_=stu.mixers.stu.require"),
    (MIXER, call("stu.STU", __class__="x"), "unexpected keyword argument '__class__'"),
    (MIXER, call("stu.STU", self=1), "unexpected keyword argument 'self'"),
    (MIXER, call("stu.STU", seq_len=call("os.system")), "_target_=os.system"),
    (MIXER, {"_target_": "stu.STU", "_partial_": "yes"}, "_partial_=yes: must be true or false"),
    (MIXER, {"_target_": "stu.STU", "_partial_": False, "seq_len": 12}, "missing a required argument: 'd_model'"),
    (MIXER, {"seq_len": 12}, "must be a mapping with _target_"),
    (MIXER, nested(12), "cannot be made as it says"),
    (MIXER, nested(300), "is nested more than 100 deep"),
    (MIXER, nested(900), "is nested more than 100 deep"),
    ("model.encoder", call("stu.heads.StepHead"), "model.encoder=stu.heads.StepHead: must be of stu.encoders"),
    ("model.head", [], "model.head=: must be of stu.heads"),
    ("model.more", {}, "must have encoder, backbone, head, and nothing else"),
    ("model.backbone.d_model", 10**9, "d_model=1000000000: must be at most 1,024"),
    ("model.backbone.depth", 10**6, "depth=1000000: must be at most 1,024"),
    ("model.backbone.depth", 3, "backbone.blocks.2"),
    ("model.backbone.d_model", 1000, "does not fit its model, in which it is"),
    ("model.backbone.d_model", 8.5, "cannot be made as it says"),
    (f"{MIXER}.seq_len", 10**12, "seq_len=1000000000000: must be at most 4,194,304"),
    (
        MIXER,
        call("stu.STU", seq_len=2**22, num_filters=17),
        "num_filters=17: must be at most 16, for filters of seq_len",
    ),
    (f"{MIXER}.seq_len", 13, "what was saved is of seq_len=12"),
    ("model.encoder.d_input", 10**15, "d_input=1000000000000000: must be at most"),
    ("preprocessing.inputs", {"kind": "numbers", "mean": [0], "std": [1]}, "does not fit the model"),
    ("preprocessing.inputs", {"kind": "tokens", "vocab_size": 10**15}, "does not fit the model"),
    ("preprocessing.inputs", {"kind": "tokens", "vocab_size": 10**30}, "does not fit the model"),
    ("preprocessing.inputs", {"kind": "os.system"}, "must have a kind: text, tokens, numbers, classes"),
    ("preprocessing.targets", {"kind": "classes", "labels": [1, 2]}, "is of 2 values, the model has 3 outputs"),
    ("preprocessing.targets", {"kind": "classes", "labels": [[1], [2], [3]]}, "labels=[[1]]: must be texts, numbers"),
    ("preprocessing.targets", {"kind": "classes", "labels": [1, 2, None]}, "labels=[None]: must be texts, numbers"),
    ("task", {}, "task.name=None:"),
    ("task.columns", "x", "task.columns=x:"),
    ("task.columns", [1], "task.columns=[1]:"),
    ("task.seq_len", 10**30, "task.seq_len=1000000000000000000000000000000: must be 1 to"),
    ("task.next_token", {"start": "x"}, "task.next_token={'start': 'x'}"),
    ("task.next_token", {"start": True}, "task.next_token={'start': True}"),
    ("task.next_token", {"start": 0}, "task.next_token=0: "),
    ("task.precondition", {"polynomial": "chebyshev"}, "task.precondition={'polynomial': 'chebyshev'}"),
    ("task.precondition", {"polynomial": "x", "degree": 2, "inputs": True}, "polynomial=x: must be one of"),
    ("format", "other", "is not of a model that stu.export wrote"),
    ("version", 2, "a newer stu wrote it"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an exported folder."""
    folder = exported(tmp_path_factory.mktemp("exported") / "folder")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path, whole: dict[str, bytes]) -> Path:
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize(("key", "value", "line"), WRONG)
def test_what_a_stranger_may_write_is_one_line(folder: Path, key: str, value: Any, line: str):
    with pytest.raises(OptionError, match=re.escape(line)) as error:
        stu.load(changed(folder, key, value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "damage", "line"),
    [
        (CONFIG, lambda content: content[:-30], "is no JSON"),
        (CONFIG, lambda content: b"[" * 10**6, "is no JSON"),
        (CONFIG, lambda content: b"[]", "is not of a model"),
        (CONFIG, lambda content: b"\xff" + content, "is no JSON"),
        (WEIGHTS, lambda content: content[:-30], "is missing or damaged"),
        (WEIGHTS, lambda content: b"\x80\x04cos\nsystem\n", "is missing or damaged"),
        (WEIGHTS, lambda content: content[:1] + b"\xff" * 7 + content[8:], "is missing or damaged"),
    ],
)
def test_damaged_files_are_one_line(folder: Path, name: str, damage: Any, line: str):
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(OptionError, match=line):
        stu.load(folder)
    (folder / name).unlink()
    with pytest.raises(OptionError, match=f"{name}.*: (cannot be read|is missing)"):
        stu.load(folder)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda weights: weights.pop("head.linear.bias"), "head.linear.bias=missing"),
        (lambda weights: weights.update(more=torch.zeros(2)), r"more=\(2,\): .* unknown to it"),
        (lambda weights: weights.update({"head.linear.bias": torch.zeros(4)}), r"=\(4,\): .* in which it is \(3,\)"),
        (lambda weights: weights.update({"head._extra_state": torch.zeros(2)}), None),  # no structure to compare
        (lambda weights: weights.update({"encoder._extra_state": torch.zeros(2)}), "belong to another model"),
    ],
)
def test_other_weights_are_one_line(folder: Path, change: Any, line: str | None):
    weights = safetensors.load_file(folder / WEIGHTS)
    change(weights)
    safetensors.save_file(weights, folder / WEIGHTS)
    if line is None:
        stu.load(folder)
    else:
        with pytest.raises(OptionError, match=line):
            stu.load(folder)


def test_weights_that_are_not_finite_are_noted(folder: Path):
    weights = safetensors.load_file(folder / WEIGHTS)
    weights["head.linear.bias"][1] = torch.nan
    safetensors.save_file(weights, folder / WEIGHTS)
    with pytest.warns(UserWarning, match=r"head\.linear\.bias has values that are not finite"):
        stu.load(folder)


def test_parts_of_ones_own_are_called_where_their_package_is_trusted(folder: Path):
    changed(folder, f"{MIXER}._target_", f"{__name__}.Own")
    with pytest.raises(OptionError, match=r"trust=… may name its package"):
        stu.load(folder)
    assert isinstance(stu.load(folder, trust=["tests"]).model.backbone.blocks[0].mixer, Own)


class Own(STU):
    """A mixer that stu does not have."""


def test_a_card_is_written_whatever_a_stranger_says_of_the_training(folder: Path, tmp_path: Path):
    changed(folder, "about", {"test": {"accuracy": 0.5, "x": "abc"}, "packages": "x", "baselines": 5})
    stu.load(folder).save(tmp_path / "again")
    assert "| test accuracy | 0.5 |" in (tmp_path / "again" / "README.md").read_text()


def test_nothing_is_overwritten_unasked(folder: Path, tmp_path: Path):
    loaded = stu.load(folder)
    with pytest.raises(OptionError, match="exists; choose another"):
        loaded.save(folder)
    loaded.save(folder, overwrite=True)
    (other := tmp_path / "other").mkdir()
    for name in (None, CONFIG, WEIGHTS):  # as the models of other libraries are called
        if name:
            (other / name).write_text("{}")
        with pytest.raises(OptionError, match="holds something else"):
            loaded.save(other, overwrite=True)
    loaded.save(tmp_path / "noted")
    (tmp_path / "noted" / "notes.txt").write_text("kept")
    with pytest.raises(OptionError, match="holds something else"):
        loaded.save(tmp_path / "noted", overwrite=True)
    assert [path.name for path in tmp_path.parent.glob(f".{tmp_path.name}*")] == []


def test_what_predicts_the_next_token_generates(tmp_path: Path):
    torch.manual_seed(1)
    model = stu.SequenceModel(TokenEncoder(8, vocab_size=257), factory("stu", seq_len=12)(), StepHead(8, d_output=257))
    text = Preprocessing(Text(), Text())
    write_folder(tmp_path / "folder", model.eval(), text.as_dict(), {**TASK, "next_token": {"start": 0}}, {})
    loaded = stu.load(tmp_path / "folder")
    tokens = generate(model, [98, 99], 20, start=0, alphabet=range(1, 257), generator=torch.Generator().manual_seed(3))
    assert "".join(loaded.generate("ab", max_tokens=20, seed=3)) == Text().decode(list(tokens))
    assert "".join(loaded.generate(max_tokens=3, temperature=0))
    with pytest.raises(OptionError, match="task=Steps: generates nothing"):
        stu.load(exported(tmp_path / "other", model, text.as_dict())).generate("ab")


def language_model(folder: Path, encoding: Any, outputs: int, start: int | None) -> Trained:
    """Loaded from a folder, with random weights."""
    encoder, backbone = TokenEncoder(8, vocab_size=outputs), factory("stu", seq_len=12)()
    model = randomized(stu.SequenceModel(encoder, backbone, StepHead(8, d_output=outputs)))
    facts = {**TASK, "next_token": {"start": start}}
    write_folder(folder, model.eval(), Preprocessing(encoding, encoding).as_dict(), facts, {})
    return stu.load(folder)


@pytest.mark.parametrize("start", [None, 0, 3])
def test_the_next_token_is_predicted_as_it_is_generated(tmp_path: Path, start: int | None):
    loaded = language_model(tmp_path / "folder", Tokens(5), 5, start)
    inputs = [[1, 4, 2, 2, 0], [3], list(range(5)) * 2 + [1]]
    for tokens, prediction in zip(inputs, loaded.predict(inputs), strict=True):
        generated = [
            int("".join(loaded.generate(tokens[: step + 1], temperature=0, max_tokens=1)))
            for step in range(len(tokens))
        ]
        assert prediction.value == generated
    longest = 12 if start is None else 11
    with pytest.raises(OptionError, match=rf"inputs\[0\]=13 steps: must have 1 to {longest}, .*seq_len.*into pieces"):
        loaded.predict([[1] * 13])
    if start is not None:
        with pytest.raises(OptionError, match=r"=12 steps: .* less the token that starts a sequence"):
            loaded.predict([[1] * 12])


@pytest.mark.parametrize(
    ("encoding", "prompt"),
    [(Text("characters", tuple("abcde")), "abba"), (Text("words", ("one", "two")), "one two"), (Tokens(3), "1 2 0")],
)
def test_no_token_is_predicted_that_the_vocabulary_lacks(tmp_path: Path, encoding: Any, prompt: str):
    loaded = language_model(tmp_path / "folder", encoding, 31, 0)
    with torch.no_grad():
        loaded.model.head.linear.bias[[0, 30]] += 1e6  # padding, and none
    loaded.save(tmp_path / "again")
    again = stu.load(tmp_path / "again")
    tokens = encoding.encode(again.predict([prompt])[0].value if isinstance(encoding, Text) else [1, 2, 0])
    assert len(tokens) == len(encoding.encode(prompt))
    last = "".join(again.generate(prompt, temperature=0, max_tokens=1))
    value = again.predict([prompt])[0].value
    assert value.endswith(last) if isinstance(value, str) else value[-1] == int(last)
    with pytest.raises(OptionError, match=re.escape("task.next_token=31: ")):
        stu.load(changed(tmp_path / "again", "task.next_token.start", 31))


def test_defaults_of_the_user_do_not_matter(folder: Path):
    torch.set_default_dtype(torch.float64)
    try:
        loaded = stu.load(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {x.dtype for x in loaded.model.parameters()} == {torch.float32}
    assert loaded.predict([[[1, 2]]])[0].value.shape == (3,)


def test_a_function_is_no_part():
    with pytest.raises(OptionError, match="must be a class of a module"):
        described(len)
