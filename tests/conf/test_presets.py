"""The presets of conf/experiment: they compose, build what they name, and have the numbers of their sources."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf

import train
from experiments.compare.groups import Group
from experiments.compare.published import reduced
from stu import SequenceModel
from stu.cli.check import check
from stu.cli.composition import build
from stu.cli.usage import CONF, options_of
from stu.training import StepPlan
from stu.training.optim import warmup_steps
from tests import runs, sources
from tests.experiments.rows import row as run_row
from tests.models import composed

pytestmark = pytest.mark.slow

PRESETS = [name for name in options_of("experiment") if name != "none"]
PUBLISHED = [name for name in PRESETS if name.startswith("lra/")]

# Each table has what the sources say. Steps and warm-up are optimiser steps, also where the source counts epochs of
# the training set, in its first row. `rate` is the peak of a group of parameters, `decay` its weight decay; without a
# parameter they are those of the group that has the norms.

# state-spaces/s4 at e757cef, configs/experiment/lra/s4-*.yaml. n_ssm of 256: a state matrix for every channel.
S4 = """
                  listops     text  retrieval    image  pathfinder     pathx
examples            96000    22500     147086    45000      160000    160000
depth                   6        6          6        6           6         6
d_model               256      256        256      512         256       256
d_state                 4        4          4       64          64        64
n_ssm                   1        1          1        1         256       256
dt_min               .001     .001       .001     .001        .001     .0001
dt_max                 .1       .1         .1       .1          .1        .1
causal              false    false      false    false       false     false
prenorm             false     true       true    false        true      true
norm                batch    batch      batch    batch       batch     batch
dropout                 0        0          0       .1           0         0
pool                 mean     mean       mean     mean        mean      mean
batch                  32       16         64       50          64        16
steps              120000    50000      50000   180000      500000    500000
warmup              12000     5000       5000    18000       50000     50000
rate                  .01      .01        .01      .01        .004      .001
rate:log_dt           .01      .01        .01     .001        .001      .001
rate:A_imag          .001     .001       .001     .001        .001      .001
rate:B               .001     .001       .001     .001        .001      .001
rate:C                .01      .01        .01      .01        .004      .001
decay                 .05      .05        .05      .05         .05       .05
decay:log_dt            0        0          0        0           0         0
decay:A_imag            0        0          0        0           0         0
decay:B                 0        0          0        0           0         0
schedule           cosine   cosine     cosine   cosine      cosine    cosine
min_lr                  0        0          0        0           0         0
clip                 null     null       null     null        null      null
"""

# Table 5 of 2508.20441; what it leaves open, from n_ssm on, is that of S4 and of the paper's text.
S4D_DFOUT = """
                  listops     text  retrieval    image  pathfinder     pathx
examples            96000    22500     147086    45000      160000    160000
depth                   6        6          6        6           6         6
d_model               256      256        256      512         256       256
d_state                64       64         64       64         128       128
norm                batch    batch      batch    layer       batch     batch
prenorm             false     true       true    false        true      true
dropout                 0        0          0       .1           0         0
rate                  .01      .01        .01      .01        .001     .0005
batch                  50       16         64       50          64        32
epochs                 40       32         20      200         200        50
steps               76800    44992      45960   180000      500000    250000
decay                 .05      .05        .05      .05         .03       .05
dt_min               .001     .001       .001     .001        .001     .0001
dt_max                 .1       .1         .1       .1          .1        .1
n_ssm                 256      256        256      512         256       256
causal              false    false      false    false       false     false
pool                 mean     mean       mean     mean        mean      mean
warmup               7680     4499       4596    18000       50000     25000
rate:log_dt          .001     .001       .001     .001        .001      .001
decay:log_dt            0        0          0        0           0         0
schedule           cosine   cosine     cosine   cosine      cosine    cosine
min_lr                  0        0          0        0           0         0
"""

# lindermanlab/S5 at 3c18fdb, bin/run_experiments; 35 epochs of Text are 17,500 steps where no review is held out.
S5 = """
                  listops     text  retrieval    image  pathfinder     pathx
examples            96000    22500     147086    45000      160000    160000
depth                   8        6          6        6           6         6
d_model               128      256        128      512         192       128
d_state                16      192        256      384         256       256
blocks                  8       12         16        3           8        16
conj_sym             true     true       true     true        true      true
discretization        zoh      zoh        zoh      zoh         zoh       zoh
C_init       lecun_normal  lecun_normal  trunc_standard_normal  lecun_normal  trunc_standard_normal  complex_normal
clip_eigs           false    false      false     true       false     false
dt_min               .001     .001       .001     .001        .001     .0001
dt_max                 .1       .1         .1       .1          .1        .1
gated               input    input  activated  activated  activated  activated
causal              false    false      false    false       false     false
prenorm              true     true       true     true        true      true
norm                batch    batch      batch    batch       batch     batch
dropout                 0       .1          0       .1         .05         0
pool                 mean     mean       mean     mean        mean      mean
batch                  50       50         32       50          64        32
epochs                 40       35         20      250         200        75
steps               76800    15750      91920   225000      500000    375000
warmup               1920        0       4596      900        2500      5000
rate                 .003     .004       .002    .0045       .0045     .0018
rate:Lambda          .001     .001       .001     .001       .0009     .0006
rate:log_dt          .001     .004       .002     .001       .0009     .0006
rate:B               .003     .001       .001    .0045       .0009     .0006
rate:C               .003     .004       .002    .0045       .0045     .0018
decay                 .04      .07        .05      .07         .03       .06
decay:Lambda            0        0          0        0           0         0
decay:log_dt            0      .07        .05        0           0         0
decay:B               .04        0          0      .07           0       .06
decay:C               .04      .07        .05      .07         .03       .06
schedule           cosine   cosine     cosine   cosine      cosine    cosine
min_lr                  0        0          0        0           0         0
"""

# NicolasZucchet/minimal-LRU at bbd71b1; Path-X: raresdolga/s5 at bd1c25b, bin/run_experiments/run_lra_pathx.sh.
LRU = """
                  listops     text  retrieval    image  pathfinder     pathx
examples            96000    22500     147086    45000      160000    160000
depth                   4        4          4        4           4         6
d_model               256      256        256      256         256       128
d_state               128      128        128      128         128       256
r_min                   0        0          0        0           0      .999
r_max                   1        1          1        1           1     .9999
max_phase            6.28     6.28       6.28     6.28        6.28       .31
causal               true     true       true     true        true     false
prenorm              true     true       true     true        true      true
norm                batch    batch      batch    batch       batch     batch
dropout                .1       .1         .1       .1          .1         0
pool                 mean     mean       mean     mean        mean      mean
batch                  64       64         64       64          64        32
epochs                 40       35         20      180         200        75
steps               60000    12285      45960   126540      500000    375000
warmup                  0        0          0        0           0      5000
rate                 .001     .001       .001     .001        .001      .004
rate:nu_log         .0005    .0005      .0005    .0005       .0005      .001
rate:theta_log      .0005    .0005      .0005    .0005       .0005      .001
rate:gamma_log      .0005    .0005      .0005    .0005       .0005      .001
rate:B              .0005    .0005      .0005    .0005       .0005      .004
decay                 .05      .05        .05      .05         .05       .05
decay:nu_log            0        0          0        0           0         0
decay:B                 0        0          0        0           0       .05
schedule           cosine   cosine     cosine   cosine      cosine    cosine
min_lr            .0000001 .0000001  .0000001 .0000001    .0000001         0
"""

# google-research/long-range-arena at cd31e5c, configurations of the Transformer. Rate: the highest that is reached.
TRANSFORMER = """
                  listops     text  retrieval    image  pathfinder     pathx
examples            96000    22500     147086    45000      160000    160000
depth                   4        4          4        1           4         1
d_model               512      256        128      128          32        32
heads                   8        4          4        8           4         2
expand                  2        4          4        1           1         1
positions      sinusoidal  sinusoidal  sinusoidal  learned  sinusoidal  learned
causal              false    false      false    false       false     false
prenorm              true     true       true     true        true      true
norm                layer    layer      layer    layer       layer     layer
final_norm           true     true       true     true        true      true
dropout                .1       .1         .1       .3          .2        .1
attention_dropout      .1       .1         .1       .2          .1        .1
pool                first    first      first    first        mean      mean
batch                  32       32         32      256         512        64
steps                5000    20000       5000    35000       62400    500000
warmup               1000     8000       5000      175         312      2500
rate                .0016   .00056     .00035    .0005        .001      .001
decay                  .1       .1         .1        0           0         0
betas           [.9,.98] [.9,.98]   [.9,.98] [.9,.98]    [.9,.98]  [.9,.98]
eps              1.0e-09  1.0e-09    1.0e-09  1.0e-09     1.0e-09   1.0e-09
schedule            rsqrt    rsqrt     cosine   cosine      cosine    cosine
clip                 null     null       null     null        null       1.0
"""

# A start: sizes and steps of S4, the optimiser (and for Image all) of google-deepmind/spectral_ssm at f7024d8.
STU = """
                  listops     text  retrieval    image  pathfinder     pathx
examples            96000    22500     147086    45000      160000    160000
depth                   6        6          6        6           6         6
d_model               256      256        256      256         256       256
filters                24       24         24       24          24        24
k_u                     3        3          3        3           3         3
k_y                     2        2          2        2           2         2
recurrence        learned  learned    learned  learned     learned   learned
causal              false    false      false    false       false     false
prenorm              true     true       true     true        true      true
norm                batch    batch      batch    batch       batch     batch
dropout                 0        0          0       .1           0         0
pool                 mean     mean       mean     mean        mean      mean
batch                  32       16         64       48          64        16
steps              120000    50000      50000   180000      500000    500000
warmup              12000     5000       5000    18000       50000     50000
rate                .0005    .0005      .0005    .0005       .0005     .0005
rate:m_y           .00005   .00005     .00005   .00005      .00005    .00005
decay                  .1       .1         .1       .1          .1        .1
decay:m_y               0        0          0        0           0         0
schedule           cosine   cosine     cosine   cosine      cosine    cosine
min_lr            .0000001 .0000001  .0000001 .0000001    .0000001  .0000001
"""

# facebookresearch/mega, examples/mega/README.lra.md and fairseq/models/lra/model.py. Batches are those of a step.
MEGA = """
                  listops     text  retrieval    image  pathfinder     pathx
examples            96000    22500     147086    45000      160000    160000
depth                   6        4          6        8           6         4
d_model                80      128        128      160         128        64
d_query                64       64         64       96          64        32
d_average              16       16         16       16          16        16
attention         softmax  softmax    softmax  laplace     laplace   laplace
causal              false    false      false    false       false     false
prenorm             false    false      false     true        true      true
norm                layer      rms        rms    batch       batch     batch
final_norm          false    false      false     true        true      true
dropout                .1       .1         .1        0           0         0
pool                 mean     mean       mean     mean        mean      mean
batch                  64       50         64       50         128       128
steps               90000    25000      91960   180000      250000    125000
warmup               3000    10000      10000     9000       50000     25000
rate                 .001     .004       .003      .01         .01       .01
decay                 .01      .01        .04      .02         .01       .01
betas          [0.9,0.98] [0.9,0.98] [0.9,0.98] [0.9,0.98] [0.9,0.98] [0.9,0.98]
schedule           linear   linear     linear   linear      linear    linear
min_lr                  0        0          0        0           0         0
clip                    1        1          1        1           1         1
"""

TABLES = {"mega": MEGA, "s4": S4, "s4d_dfout": S4D_DFOUT, "s5": S5, "lru": LRU, "transformer": TRANSFORMER, "stu": STU}

# Row of a table → key of the configuration.
KEYS = {
    "examples": "task.data.train",
    "pool": "task.pool",
    **{name: f"model.{name}" for name in ("depth", "d_model", "norm", "prenorm", "final_norm", "dropout", "positions")},
    **{
        name: f"model.mixer.{name}" for name in ("causal", "d_state", "n_ssm", "dt_min", "dt_max", "conj_sym", "C_init")
    },
    **{name: f"model.mixer.{name}" for name in ("discretization", "clip_eigs", "r_min", "r_max", "max_phase")},
    **{name: f"model.mixer.{name}" for name in ("k_u", "k_y", "recurrence", "d_query", "attention")},
    "blocks": "model.mixer.num_blocks",
    "heads": "model.mixer.num_heads",
    "filters": "model.mixer.num_filters",
    "d_average": "model.mixer.d_state",
    "attention_dropout": "model.mixer.dropout",
    "gated": "model.channel_mixer.gated",
    "expand": "model.channel_mixer.expand",
    "batch": "loader.batch_size",
    "epochs": "trainer.max_epochs",
    "clip": "trainer.gradient_clip_val",
    **{name: f"optimizer.{name}" for name in ("betas", "eps", "schedule", "min_lr")},
}


def table(text: str) -> dict[str, dict[str, Any]]:
    """Task → row → value."""
    (*tasks,), *rows = (line.split() for line in text.strip().splitlines())
    assert all(len(values) == len(tasks) for _, *values in rows)
    return {task: {name: yaml.safe_load(values[i]) for name, *values in rows} for i, task in enumerate(tasks)}


def read(config: DictConfig, rows: Iterable[str]) -> dict[str, Any]:
    """What a configuration at full size comes to, for the rows of a table."""
    limits = ("max_epochs", "max_steps", "val_check_interval", "accumulate_grad_batches")
    budget = {key: config.trainer[key] for key in limits}
    plan = StepPlan.make(examples=config.task.data.train, batch_size=config.loader.batch_size, **budget)
    counts = {"steps": plan.total_steps, "warmup": warmup_steps(config.optimizer.warmup, plan.total_steps)}
    options = {row: OmegaConf.select(config, KEYS[row], throw_on_missing=True) for row in rows if row in KEYS}
    found = counts | groups(config, plan.total_steps) | options
    return {row: found[row] for row in rows}


def groups(config: DictConfig, total_steps: int) -> dict[str, float]:
    """Rate and decay of the parameters of a mixer (rate:B …) for short sequences, and of a norm (rate)."""
    short = config.copy()
    short.task.seq_len = 64
    backbone = build(short.model, depth=1)
    recipe = build(config.optimizer)(backbone.named_parameters(), total_steps)
    optimizer, _ = recipe.build(backbone.named_parameters())
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    block = backbone.blocks[0]
    named = {f":{name}": parameter for name, parameter in block.mixer.named_parameters()}
    named[""] = next(block.norm.parameters())
    return {
        f"{row}{name}": group_of[id(parameter)][option]
        for row, option in (("rate", "initial_lr"), ("decay", "weight_decay"))
        for name, parameter in named.items()
    }


def test_every_model_has_a_preset_for_every_task():
    assert set(PUBLISHED) == {f"lra/{task}/{model}" for model, text in TABLES.items() for task in table(text)}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_passes_the_checks_and_builds_what_it_names(name: str):
    check(composed(f"experiment={name}"))
    config = composed(*runs.small(f"experiment={name}"))
    check(config)
    _, network = train.task_and_model(config)
    assert isinstance(network, SequenceModel)
    build(config.optimizer)(network.named_parameters(), 1000)  # refuses groups that match nothing


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where small data of every task are, made once."""
    return tmp_path_factory.mktemp("presets")


@pytest.mark.parametrize(
    "name", [name if "/listops/" in name else pytest.param(name, marks=pytest.mark.thorough) for name in PUBLISHED]
)
def test_a_preset_takes_a_step_on_its_task(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """From the data to changed parameters, everything small; the fetched data are stand-ins."""
    monkeypatch.setattr("data.lra.pathfinder_images.SLOTS", 16)
    source = sources.overrides(f"lra_{name.split('/')[1]}", folder)
    config = composed(*runs.small(f"experiment={name}", f"paths.data={folder / 'data'}", *source))
    task, network = train.task_and_model(config)
    task.prepare()
    examples = task.datasets().train
    batch = task.collate([examples[index] for index in range(8)])
    recipe = build(config.optimizer)(network.named_parameters(), 10)
    optimizer, schedule = recipe.build(network.named_parameters())
    first = {key: value.clone() for key, value in network.state_dict().items()}
    for _ in range(3):  # the rate of the first may be zero
        optimizer.zero_grad()
        prediction, target = task.scored(network(batch.inputs, batch.mask), batch)
        loss = task.loss(prediction, target)
        loss.backward()
        optimizer.step()
        schedule.step()
    assert len(target) == 8
    assert 0 < loss < 5
    same = [key for key, value in network.named_parameters() if torch.equal(value, first[key])]
    assert same == []
    assert all(value.isfinite().all() for value in network.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_differences_only(name: str):
    preset = OmegaConf.load(CONF / "experiment" / f"{name}.yaml")
    chosen = [f"{group.split('/')[-1]}={choice}" for entry in preset.pop("defaults") for group, choice in entry.items()]
    base, full = composed(*chosen), composed(f"experiment={name}")
    for key in leaves(OmegaConf.to_container(preset), ""):
        assert OmegaConf.select(base, key) != OmegaConf.select(full, key), f"{key} is {OmegaConf.select(base, key)}"


def leaves(node: Any, key: str) -> list[str]:
    if not isinstance(node, dict):
        return [key]
    return [leaf for name, child in node.items() for leaf in leaves(child, f"{key}.{name}" if key else name)]


@pytest.mark.parametrize(("task", "model"), [(task, model) for model, text in TABLES.items() for task in table(text)])
def test_a_preset_has_the_numbers_of_its_source(task: str, model: str):
    expected = table(TABLES[model])[task]
    config = composed(f"experiment=lra/{task}/{model}", *["task.data.source=/x"] * (task == "retrieval"))
    found = read(config, expected)
    assert found == {row: pytest.approx(v, rel=1e-9) if isinstance(v, float) else v for row, v in expected.items()}
    content: Any = OmegaConf.to_container(config, resolve=True)
    facts = {"experiment": f"lra/{task}/{model}", "config": content}
    assert reduced(Group(f"lra_{task}", model, {}, (run_row(f"lra_{task}/{model}/a", **facts),))) is None


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_says_what_it_is_and_how_to_run_it(name: str):
    """Paper, published accuracy, command, and our own result."""
    _, task, model = name.split("/")
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    header = text[: text.index("defaults:")]
    assert header.startswith("# @package _global_\n# ")
    assert re.search(r"\(\d{4}\.\d{5}\)", header)
    assert re.search(r"^# Published: (\d\d\.\d+ %|no|nothing) ", header, re.MULTILINE)
    assert f"\n# Command: python train.py experiment={name}\n" in header
    assert "\n# Ours: " in header
    config = OmegaConf.load(CONF / "experiment" / f"{name}.yaml")
    assert config.defaults == [{"override /task": f"lra_{task}"}, {"override /model": model}]


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["quick", *(f"lra/listops/{model}" for model in TABLES)])
def test_a_preset_trains(name: str, tmp_path: Path):
    done = runs.train(tmp_path, *runs.small(f"experiment={name}", "trainer.max_steps=1", "name=run"))
    assert (done.code, done.err) == (0, "")
    [summary] = tmp_path.glob("runs/*/*/run/summary.json")
    assert yaml.safe_load(summary.read_text())["steps"] == 1
