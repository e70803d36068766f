"""mode=generate: a checkpoint continues a text, on the standard output as it comes."""

import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.language.text import Language, LanguageData
from data.memory.copying import CopyingData
from data.memory.recall import Recall
from stu import Task, training
from stu.cli.composition import build
from stu.errors import OptionError
from stu.generation import Sampling
from stu.preprocessing import Preprocessing, Text, Tokens
from stu.task import NextToken
from stu.training import Continuation, Run, model_for
from tests import runs
from tests.models import composed, factory

TEXT = "Grüße an die 好 Welt, and again: " * 30
SMALL = ("task=language", "model=stu", "loader.batch_size=2", "trainer.max_epochs=1", "name=a")


def language(folder: Path, **options: Any) -> Language:
    (folder / "a.txt").write_text(TEXT)
    data = LanguageData(dir=str(folder / "cache"), seq_len=16, source=str(folder / "a.txt"), **options)
    return Language(seq_len=16, causal=True, data=data)


def continued(task: Task, prompt: str, **options: Any) -> tuple[str, Continuation]:
    torch.manual_seed(0)
    model = model_for(task, factory("s5", seq_len=16)()).eval()
    text = Continuation(task, model, prompt, Sampling(**{"max_tokens": 40} | options))
    return "".join(text), text


@pytest.mark.parametrize("units", ["bytes", "characters", "words"])
@pytest.mark.parametrize("prompt", ["", "die 好 and"])
def test_a_prompt_is_continued_by_what_has_a_meaning(tmp_path: Path, units: Any, prompt: str):
    task = language(tmp_path, units=units, vocab_size=300)  # more than there are bytes, characters or words
    found, text = continued(task, prompt)
    assert found.startswith(prompt)
    assert text.count == 40
    assert text.rate.startswith("40 tokens, ")
    assert f"for a prompt of {len(text.prompt)}" in text.rate
    if units == "words":
        assert len(found.split()) == len(prompt.split()) + 40
    assert found == continued(task, prompt)[0] != continued(task, prompt, seed=1)[0]
    assert continued(task, prompt, max_tokens=0)[0] == prompt


def test_pieces_are_the_text_whichever_bytes_come_together():
    text = Text()
    tokens = [*text.encode("aü好🙂"), *(b + 1 for b in b"\xe5\xa5z\xff"), 0, *(b + 1 for b in b"\xf0\x9f")]
    pieces = list(text.pieces(iter(tokens)))
    assert "".join(pieces) == text.decode(tokens) == "aü好🙂\ufffdz\ufffd\ufffd"
    assert pieces[:3] == ["a", "", "ü"]
    words = Text("words", ("a", "b"))
    assert "".join(words.pieces([2, 3, 1])) == words.decode([2, 3, 1]) == "a b \ufffd"


def test_tokens_that_mean_something_else_now_are_refused(tmp_path: Path):
    """Where a text has changed since training, other words have the tokens of the model."""
    task = language(tmp_path, units="words")
    model = model_for(task, factory("s5", seq_len=16)())
    parts: Any = SimpleNamespace(trainer=build(composed("trainer=cpu").trainer, _partial_=True))
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    options: dict[str, Any] = {"prompt": "die", "sampling": Sampling(max_tokens=2)}
    own, run = task.preprocessing.as_dict(), Run(tmp_path / "run")
    for preprocessing in (own, Preprocessing(Text("words", ("x",)), Text("words", ("x",))).as_dict()):
        file = tmp_path / "a.ckpt"
        torch.save({"state_dict": state, "trained": {"preprocessing": preprocessing}}, file)
        with nullcontext() if preprocessing == own else pytest.raises(OptionError, match="were read in another way"):
            text = training.continued(run, parts, task, model, **options, settings={"checkpoint": str(file)})
            assert "".join(text).startswith("die ")


class Numbered(Recall):  # type: ignore[misc]  # a task of tokens that are no text
    """Copying, as if its predictions were the next tokens."""

    next_token = NextToken(start=None)
    preprocessing = Preprocessing(Tokens(10))


def test_tokens_are_continued_as_numbers():
    sizes = {"seq_len": 30, "train": 4, "val": 2, "test": 2, "seed": 0}
    task = Numbered(seq_len=30, causal=True, data=CopyingData(**sizes))
    found, _ = continued(task, "3 1 4")
    assert found.startswith("3 1 4 ")
    assert len(found.split()) == 43
    for prompt, line in (
        ("", "prompt='': must not be empty"),
        ("3 x", "prompt=3 x: must be integers, with spaces between"),
        ("3 10", r"prompt=\[10\]: must be in 0 … 9"),
        ("9" * 30, "prompt=9+: must be integers"),
    ):
        with pytest.raises(OptionError, match=line):
            continued(task, prompt)
    with pytest.raises(OptionError, match="mode=generate: needs a task whose predictions are the next token"):
        continued(Recall(seq_len=30, causal=True, data=CopyingData(**sizes)), "3 1 4")


def stdin(file: Path) -> None:
    os.dup2(os.open(file, os.O_RDONLY), 0)


@pytest.mark.e2e
def test_a_run_writes(tmp_path: Path):
    (tmp_path / "a.txt").write_text(TEXT)
    command = runs.small(*SMALL, "task.seq_len=16", f"task.data.source={tmp_path / 'a.txt'}", "task.data.train=8")
    assert runs.train(tmp_path, *command).code == 0
    write = (*command, "mode=generate", "generate.max_tokens=20")
    before = sorted(path for path in (tmp_path / "runs").rglob("*"))
    prompt = "Who's ${there}, \\'ü'? [a=b"
    done = runs.train(tmp_path, *write, f"prompt={prompt}")
    assert (done.code, done.out[: len(prompt)]) == (0, prompt)
    assert done.err.startswith("20 tokens, ")
    assert done.err.count("\n") == 1
    assert sorted(path for path in (tmp_path / "runs").rglob("*")) == before
    (tmp_path / "prompt").write_bytes(prompt.encode() + b"\xff\r\n")
    read = runs.train(tmp_path, *write, "prompt=-", at=partial(stdin, tmp_path / "prompt"))
    assert (read.code, read.out[: len(prompt) + 2]) == (0, f"{prompt}\ufffd\n")  # as the test reads \r\n
    wrong = runs.train(tmp_path, *write, "checkpoint=nope")
    assert (wrong.code, wrong.err) == (2, "error: checkpoint=nope: no such file; train first, or name one\n")
