"""A trained model continues a text."""

import time
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from stu import generation
from stu.backbone import SequenceModel
from stu.errors import OptionError, require
from stu.generation import Sampling
from stu.preprocessing import Numbers, Text, Tokens
from stu.task import Task
from stu.training import evaluate, states
from stu.training.fitting import Parts
from stu.training.module import SequenceModule
from stu.training.plan import make_trainer
from stu.training.run import Run


class Continuation:
    """Iterates over the pieces of a prompt and of what follows, as they are drawn; `rate` says how fast that was.

    Raises `OptionError` where the predictions of the task are not the next token, and for a prompt that cannot be read.
    """

    def __init__(self, task: Task, model: SequenceModel, prompt: str, sampling: Sampling) -> None:
        allowed = "needs a task whose predictions are the next token, such as task=language"
        if task.next_token is None or task.preprocessing is None:
            raise OptionError("mode", "generate", allowed)
        start, encoding = task.next_token.start, task.preprocessing.inputs
        assert not isinstance(encoding, Numbers), "a token follows tokens"
        self.encoding: Text | Tokens = encoding
        try:
            self.prompt = self.encoding.encode(prompt).tolist()
        except OptionError as error:
            raise OptionError("prompt", error.value, error.allowed) from error
        begun = bool(self.prompt) or start is not None
        require(begun, "prompt", "''", "must not be empty: this task has no token that starts a sequence")
        self.drawn = generation.continued(model, self.prompt, sampling, start=start, alphabet=self.encoding.alphabet)
        self.count, self.reading, self.writing = 0, 0.0, 0.0  # tokens; seconds until the first, and from it to the last

    def __iter__(self) -> Iterator[str]:
        """Pieces of text, some of them empty."""
        return self.encoding.pieces(chain(self.prompt, self._timed()))

    @property
    def rate(self) -> str:
        """How many tokens were generated, and how fast."""
        per_second = f", {(self.count - 1) / self.writing:,.0f} tokens/s" if self.count > 1 else ""
        return f"{self.count:,} tokens{per_second}, after {self.reading:.2f} s for a prompt of {len(self.prompt):,}"

    def _timed(self) -> Iterator[int]:
        started = time.perf_counter()
        for token in self.drawn:
            self.count += 1
            if self.count == 1:
                self.reading = time.perf_counter() - started
            self.writing = time.perf_counter() - started - self.reading
            yield token


def continued(
    run: Run,
    parts: Parts,
    task: Task,
    model: SequenceModel,
    *,
    prompt: str,
    sampling: Sampling,
    settings: Mapping[str, Any],
) -> Continuation:
    """A text, continued by the weights of a checkpoint, in float32, on the first device that the Trainer would have.

    Raises `OptionError` where there is no such checkpoint, or its tokens have other meanings than the task's.
    """
    trainer = make_trainer(parts.trainer, logger=False, default_root_dir=run.checkpoints)
    model = model.to(trainer.strategy.root_device).eval()
    text, module = Continuation(task, model, prompt, sampling), SequenceModule(model, task)
    checkpoint = evaluate.restore(module, run, settings["checkpoint"], settings)
    other = module.other_preprocessing(states.read(checkpoint, tensors=False))
    require(not other, "checkpoint", checkpoint, other)
    return text
