"""Pretraining: what is hidden and asked for, on every task; two phases of one run that stops and resumes anywhere."""

import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor, nn

import stu
from stu.backbone import SequenceModel
from stu.cli.composition import build
from stu.cli.usage import options_of
from stu.encoders import LinearEncoder, TokenEncoder
from stu.errors import OptionError
from stu.pretraining import HIDDEN, IGNORE, HidingEncoder, MaskedInputs, NextInputs, PredictedInputs
from stu.task import Batch, Classification, Splits
from stu.training.loggers import read_metrics
from stu.training.records import flatten
from stu.training.run import is_default
from tests import runs, sources
from tests.models import composed, kinds_of_tasks, small_backbone
from tests.training.test_host_waits import watch

V, C, L = 7, 2, 12


class Sequences:
    """Sequences of these lengths: of tokens, or of reals."""

    seq_len = None

    def __init__(self, lengths: list[int], tokens: bool) -> None:
        self.lengths, rng = np.array(lengths), np.random.default_rng(0)
        self.inputs: list[Any] = [
            rng.integers(V, size=n) if tokens else rng.normal(size=(n, C)).astype("f") for n in lengths
        ]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int, /) -> tuple[Any, int]:
        return self.inputs[index], 0


class Labelled(Classification):
    """A task that has these sequences in every split."""

    def __init__(self, lengths: list[int], *, tokens: bool, causal: bool = True) -> None:
        self.seq_len, self.causal, self.tokens, self.num_classes, self.pool = L, causal, tokens, 2, "mean"
        self.data: Any = Sequences(lengths, tokens)

    def datasets(self) -> Splits:
        return Splits(self.data, self.data, self.data)

    def baselines(self) -> dict[str, float]:
        return {}

    def encoder(self, d_model: int) -> nn.Module:
        return TokenEncoder(d_model, vocab_size=V) if self.tokens else LinearEncoder(d_model, d_input=C)

    def batch(self) -> Batch:
        return self.collate([self.data[index] for index in range(len(self.data))])


def equal(x: Tensor, y: Tensor) -> bool:
    return bool(((x == y) | (x.isnan() & y.isnan())).all())


lengths = st.lists(st.integers(2, L), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None)
@given(lengths, st.booleans(), st.floats(0.01, 0.99), st.integers(1, L), st.integers(0, 9))
def test_the_share_of_the_real_steps_is_hidden_and_asked_for(sizes, tokens, ratio, span, seed):
    task = Labelled(sizes, tokens=tokens)
    masked, batch = MaskedInputs(task, task.encoder(4), ratio=ratio, span=span), task.batch()
    torch.manual_seed(seed)
    drawn = masked.drawn(batch)
    hidden = drawn.inputs == HIDDEN if tokens else drawn.inputs.isnan().all(2)
    asked = drawn.targets != IGNORE if tokens else ~drawn.targets.isnan().any(2)
    assert torch.equal(hidden, asked)
    assert hidden.sum() == max(1, round(ratio * sum(sizes)))
    assert batch.mask is None or not (hidden & ~batch.mask).any()
    assert equal(drawn.inputs[~hidden], batch.inputs[~hidden])
    assert equal(drawn.targets[hidden], batch.inputs[hidden])
    prediction = torch.randn(*batch.inputs.shape[:2], V if tokens else C)
    assert equal(masked.scored(prediction, drawn)[0], prediction[hidden])
    assert equal(masked.scored(prediction, drawn)[1], batch.inputs[hidden])


def test_steps_of_a_span_are_hidden_together():
    task = Labelled([L] * 50, tokens=True)
    torch.manual_seed(0)
    hidden = MaskedInputs(task, task.encoder(4), ratio=0.25, span=4).drawn(task.batch()).inputs == HIDDEN
    edges = (hidden[:, 1:] != hidden[:, :-1]).sum().item()
    assert edges < 0.6 * 50 * (L - 1) * 2 * 0.25 * 0.75  # far less than of independent steps


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, L), min_size=1, max_size=4), st.booleans())
@example([1, 1], True)
@example([1], False)
def test_every_step_but_the_last_asks_for_the_next_input(sizes, tokens):
    task = Labelled(sizes, tokens=tokens)
    following, batch = NextInputs(task, task.encoder(4)), task.batch()
    prediction = torch.randn(*batch.inputs.shape[:2], V if tokens else C)
    found, target = following.scored(prediction, following.drawn(batch))
    expected = [(prediction[row, t], batch.inputs[row, t + 1]) for row, n in enumerate(sizes) for t in range(n - 1)]
    assert equal(found, torch.stack([pair[0] for pair in expected]) if expected else prediction[:, 0][:0])
    assert equal(target, torch.stack([pair[1] for pair in expected]) if expected else batch.inputs[:, 0][:0])
    assert following.loss(found, target).isfinite()


def test_losses_and_baselines_are_their_formulas():
    tokens, reals = (Labelled([5, 9], tokens=kind) for kind in (True, False))
    of_tokens, x = MaskedInputs(tokens, tokens.encoder(4)), torch.cat([torch.from_numpy(x) for x in tokens.data.inputs])
    counts = torch.bincount(x, minlength=V) + 1.0
    expected = -sum(math.log(counts[token] / counts.sum()) for token in x) / len(x)
    assert of_tokens.baselines()["frequencies"] == pytest.approx(expected, rel=1e-5)
    for loss, power in (("l1", 1), ("mse", 2)):
        following = NextInputs(reals, reals.encoder(4), loss=loss)
        changes = np.concatenate([np.diff(x, axis=0) for x in reals.data.inputs])
        assert following.baselines()["repetition"] == pytest.approx((np.abs(changes) ** power).mean(), rel=1e-5)


@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "reals"])
def test_what_is_hidden_is_not_seen(tokens: bool):
    encoder = Labelled([L], tokens=tokens).encoder(4)
    hiding, batch = HidingEncoder(encoder, 4), Labelled([L], tokens=tokens).batch()
    hidden = torch.arange(L).unsqueeze(0) % 3 == 0
    shown = batch.inputs.masked_fill(hidden if tokens else hidden.unsqueeze(2), HIDDEN if tokens else math.nan)
    y = hiding(shown)
    assert torch.equal(y[hidden], hiding.hidden.expand(4, 4))
    assert torch.equal(y[~hidden], encoder(batch.inputs)[~hidden])
    y.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in hiding.parameters())


def test_what_cannot_be_pretrained_is_refused():
    task = Labelled([L], tokens=True)
    for options in ({"ratio": 0.0}, {"ratio": 1.0}, {"span": 0}, {"span": L + 1}, {"loss": "l2"}):
        with pytest.raises(OptionError, match="must be"):
            MaskedInputs(task, task.encoder(4), **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="an embedding"):
        MaskedInputs(task, nn.Linear(1, 1))
    model = SequenceModel(task.encoder(8), small_backbone("s5", seq_len=L, causal=False), task.head(8))
    with pytest.raises(OptionError, match="pretrain=next: needs a causal model"):
        NextInputs(task, model.encoder).model(model)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


QUICK = ("lds", "lra_retrieval")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=() if name in QUICK else pytest.mark.slow if name in kinds_of_tasks() else pytest.mark.thorough,
        )
        for name in options_of("task")
    ],
)
def test_every_task_has_inputs_to_pretrain_on(name: str, data: Path):
    config = composed(
        *runs.small(f"task={name}", "task.causal=true", *sources.overrides(name, data), f"paths.data={data}")
    )
    task = build(config.task)
    task.prepare()
    backbone = build(config.model)
    model = SequenceModel(task.encoder(backbone.d_model), backbone, task.head(backbone.d_model))
    made: list[PredictedInputs] = [MaskedInputs(task, model.encoder, ratio=0.3), NextInputs(task, model.encoder)]
    for inputs in made:
        network, examples = inputs.model(model), inputs.datasets().train
        batch = inputs.drawn(inputs.collate([examples[index] for index in range(3)]))
        loss = inputs.loss(*inputs.scored(network(batch.inputs, batch.mask), batch))
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
        assert all(math.isfinite(value) for value in inputs.baselines().values())
        metrics = inputs.metrics()
        next(iter(metrics.values())).update(*inputs.scored(network(batch.inputs, batch.mask), batch))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [MaskedInputs, NextInputs])
@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "reals"])
def test_a_step_of_pretraining_never_waits(kind: Any, tokens: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    task = Labelled([L, 3, 5, 9, 8, L, 2, 4], tokens=tokens)
    model = SequenceModel(task.encoder(8), small_backbone("stu_t", seq_len=L), task.head(8))
    inputs = kind(task, model.encoder)
    watch(monkeypatch, tmp_path, inputs, inputs.model(model))


WORDS = ["model=stu", "task=lra_listops", "name=x", "pretrain=masked", "pretrain.max_epochs=1", "log_every=1"]
WORDS += ["checkpoints.every_n_steps=1", "model.dropout=0.1", "trainer.max_epochs=1", "task.data.source=null"]
STEP = "stu.training.callbacks:Checkpoints.on_train_batch_end"


@pytest.mark.slow
@pytest.mark.e2e
def test_a_run_of_two_phases_resumes_to_the_last_bit_wherever_it_was_stopped(tmp_path: Path):
    words = runs.small(*WORDS)
    assert runs.train(tmp_path / "whole", *words).code == 0
    whole, broken = (runs.run_of(tmp_path / home, "lra_listops", "stu", "x") for home in ("whole", "broken"))
    home = tmp_path / "broken"
    stopped = runs.train(home, *words, at=runs.signalled(signal.SIGTERM, STEP, call=4))
    assert stopped.code == 128 + signal.SIGTERM
    assert "checkpoints/pretrain/last.ckpt" in stopped.out
    other = runs.train(home, *words, "pretrain.ratio=0.2")
    assert other.code == 2
    assert "pretrain.ratio (0.5 → 0.2)" in other.err
    between = runs.train(home, *words, at=runs.signalled(signal.SIGKILL, "stu.training.fitting:Fitting.fit", call=2))
    assert between.code == 128 + signal.SIGKILL
    assert "resumed after step 4" in between.out
    later = runs.train(home, *words, at=runs.signalled(signal.SIGKILL, STEP, call=3))
    assert later.code == 128 + signal.SIGKILL
    assert "Pretraining" not in later.out
    assert runs.train(home, *words).code == 0
    runs.assert_identical(without_seconds(broken), without_seconds(whole))
    assert whole.read_summary()["pretrain"]["steps"] == 10
    with pytest.raises(OptionError, match=r"best\.ckpt: is of pretraining, .* the trained one is in the folder above"):
        stu.load(whole.pretraining / "best.ckpt")
    first = {name: value for step, _, name, value in read_metrics(whole.pretrain_metrics) if step == 1}
    assert first.keys() >= {"train/loss", "train/accuracy", "lr/default"}


def without_seconds(run: Any) -> dict[str, Any]:
    found = runs.results(run)
    found["summary"]["pretrain"].pop("seconds")
    rows = [row for row in read_metrics(run.pretrain_metrics) if not row[2].startswith(("time/", "memory/"))]
    return {**found, "pretraining": rows}


def test_runs_made_before_there_was_pretraining_go_on_without_it():
    none, masked = (
        flatten(OmegaConf.to_container(composed(f"pretrain={name}", "task=lds"), resolve=True))
        for name in ("none", "masked")
    )
    assert [key for key in none if key.startswith("pretrain.") and not is_default(none, key)] == []
    assert "pretrain.objective" in [key for key in masked if not is_default(masked, key)]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("pretrain=next task=lra_listops", "pretrain=next: needs a causal model"),
        ("pretrain=masked pretrain.ratio=2 task=lds", "pretrain.ratio=2: must be above 0 and below 1"),
        ("pretrain=masked pretrain.lr=-1 task=lds", "lr=-1: must be above 0"),
    ],
)
@pytest.mark.e2e
def test_a_mistake_in_pretraining_is_one_line_and_makes_no_run(words: str, line: str, tmp_path: Path):
    refused = runs.train(tmp_path, *runs.small(*words.split(), "task.data.train=40"))
    assert refused.code == 2
    assert line in refused.err
    assert len(refused.err.strip().splitlines()) == 1
    assert not list((tmp_path / "runs").rglob("manifest.json"))
