"""What a user reads after asking for help, or for something impossible: one line."""

import re
import shlex
from itertools import product
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from stu.cli import arguments, errors
from stu.cli.check import check, check_call
from stu.cli.usage import BY_OTHERS, CONF, at_home, folded
from stu.errors import OptionError
from tests import runs
from tests.models import composed

SMALL_LDS = tuple(runs.small("task=lds", "model=stu"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tmp_path_factory.mktemp("home")


# Overrides, and what the line must hold: the key with its value, and what is allowed instead.
Refused = list[tuple[tuple[str, ...], tuple[str, ...]]]

# What shows before anything is built. The first of each kind is tried as a command too.
EARLY: Refused = [
    # the configuration cannot be composed
    (("model=stuu",), ("model=stuu: no such option", "s5, stu, stu_ar, ")),
    (("experiment=bla",), ("experiment=bla: no such option", "quick")),
    (("model.depht=3",), ("model.depht=3: no such key", "did you mean depth?", "d_model, depth, dropout")),
    (("optimiser=adamw",), ("optimiser=adamw: no such key", "did you mean optimizer?", "checkpoints")),
    (("sweeps=lr",), ("sweeps=lr: no such key; did you mean sweep? allowed: ",)),
    (("+lr=1e-3",), ("lr=0.001: no such key; did you mean optimizer.lr? allowed: callbacks, ",)),
    (("loader.seed=1",), ("loader.seed=1: no such key; did you mean seed or generate.seed? allowed: ",)),
    (("lr=1e-3",), ("lr=1e-3: no such key; did you mean optimizer.lr? allowed: callbacks, ",)),
    (("optimizer.depth=3",), ("optimizer.depth=3: no such key; did you mean model.depth? allowed: betas, ",)),
    (("model.hankel=slepian",), ("model.hankel=slepian: no such key; did you mean model.mixer.hankel? allowed: ",)),
    # it does not fit the constructors
    (("+foo=1",), ("foo=1: no such key", "checkpoints, experiment, figures, generate, loader")),
    (("+model.foo=1",), ("model.foo=1: no such key", "d_model, depth, dropout")),
    (("model.depth=abc",), ("model.depth=abc: must be an integer",)),
    (("model.depth=1.5",), ("model.depth=1.5: must be an integer",)),
    (("model.depth=true",), ("model.depth=True: must be an integer",)),
    (("model.d_model=null",), ("model.d_model=None: must be an integer",)),
    (("model.norm=btch",), ("model.norm=btch: must be one of batch, layer, rms, none",)),
    (("optimizer.betas=[0.9]",), ("optimizer.betas=[0.9]: must be a list of 2",)),
    (("optimizer.groups=3",), ("optimizer.groups=3: must be",)),
    (("logger.wandb.mode=of",), ("logger.wandb.mode=of: must be one of auto, online, offline, disabled",)),
    (("logger.wandb.tags=[1,2]",), ("logger.wandb.tags=[1, 2]: must be a list of strings",)),
    (("logger.wandb.tags=mine",), ("logger.wandb.tags=mine: must be a list of strings",)),
    (("mode=tst",), ("mode=tst: must be one of train, test",)),
    (("overwrite=maybe",), ("overwrite=maybe: must be true or false",)),
    (("loader.device_resident=maybe",), ("device_resident=maybe: must be true or false or one of auto",)),
    (("seed=1.5",), ("seed=1.5: must be an integer",)),
    (("seed=-1",), ("seed=-1: must be an integer in 0 … 4294967295",)),
    (("pictures.when=never",), ("pictures.when=never: no such key; it is figures now",)),
    (("log_every=often",), ("log_every=often: must be an integer",)),
    (("paths.runs=null",), ("paths.runs=None: must be a string",)),
    (("trainer.matmul_precision=low",), ("trainer.matmul_precision=low: must be one of highest, high, medium",)),
    (("trainer.strategy=dpp",), ("trainer.strategy=dpp: must be one of auto, ddp; or choose trainer=fsdp",)),
    (("trainer.strategy=fsdp",), ("trainer.strategy=fsdp: must be one of auto, ddp; or choose trainer=fsdp",)),
    (("trainer.precision=transformer-engine",), ("trainer.precision=transformer-engine: must be one of 32-true",)),
    (("+trainer.profiler=xla",), ("trainer.profiler=xla: must be one of simple, advanced",)),
    (("model.mixer._target_=stu.STUU",), ("model.mixer._target_=stu.STUU: cannot be imported",)),
    # a node that makes something else, or nothing
    (("figures=null",), ("figures=None: must be a call that makes a Figures",)),
    (("task.data=null",), ("task.data=None: must be a call that makes a LDSData",)),
    (("~task.data",), ("task.data=absent: is needed",)),
    (("~loader._target_",), ("loader={", "must be a call that makes a SequenceData")),
    (("+model._partial_=true",), ("must be a call that makes a Backbone",)),
    (("model.mixer._partial_=false",), ("must be a function that makes",)),
    (("model.mixer={_target_: builtins.dict, _partial_: true}",), ("must be a function that makes",)),
    (("+model._args_=[1]",), ("model._args_=[1]: no such key",)),
    # a value that is none
    (("optimizer.lr=nan",), ("optimizer.lr=nan: must be a number",)),
    (("model.depth=???",), ("model.depth=???: has no value yet",)),
    (("seed=${nope}",), ("seed=${nope}: Interpolation key 'nope' not found",)),
    (("optimizer.lr=${oc.env:STU_NOPE}",), ("lr=${oc.env:STU_NOPE}: Environment variable 'STU_NOPE' not found",)),
    (("trainer.val_check_interval=abc",), ("trainer.val_check_interval=abc: must be an integer or a number",)),
    # a key that nobody reads
    (("checkpoint=x",), ("checkpoint=x: is read with mode=test or generate alone",)),
    (("mode=test", "overwrite=true"), ("overwrite=True: is read with mode=train alone",)),
    (("+paths.cache=x",), ("paths.cache=x: no such key",)),
    (
        ("experiment=quick", "task=lds"),
        ("experiment=quick, for its own task and model, sets task.pool=first: no such key",),
    ),
    # a key that the code sets itself
    (
        ("+checkpoints.monitor=loss",),
        ("checkpoints.monitor=loss: no such key", "allowed: every_minutes, every_n"),
    ),
    (("+loader.seed=3",), ("loader.seed=3: no such key", "batch_size, bucket, device_resident, num_workers")),
    (("+optimizer.total_steps=9",), ("optimizer.total_steps=9: no such key",)),
    (("+figures.directory=x",), ("figures.directory=x: no such key",)),
    (("+logger.wandb.names=[a,b]",), ("logger.wandb.names=['a', 'b']: no such key",)),
    (("logger.mode=offline",), ("logger.mode=offline: no such key; it is logger.wandb.mode now",)),
    (("logger=csv", "+logger.tags=[a]"), ("logger.tags=['a']: no such key; it is logger.wandb.tags now",)),
    (("logger=csv", "logger.wandb.mode=offline"), ("logger.wandb.mode=offline: no such key; logger=wandb has it",)),
    (("+logger.mine=3",), ("logger.mine=3: must be a call that makes a Logger",)),
    (("+model.mixer.d_model=3",), ("model.mixer.d_model=3: no such key",)),
]
AS_COMMANDS = ("model=stuu", "model.depht=3", "pictures.when=never", "+foo=1", "model.depth=abc")

# What the constructors refuse.
LATE: Refused = [
    (("trainer=gpu",), ("trainer.accelerator=gpu: there is no GPU here", "trainer=cpu")),
    (("trainer.limit_val_batches=0",), ("trainer.limit_val_batches=0: must be above 0",)),
    (("trainer.limit_train_batches=-2",), ("trainer.limit_train_batches=-2: must be at least 1 batches",)),
    (("+trainer.min_steps=1",), ("trainer.min_steps=1: not supported", "max_steps")),
    (("logger=[]",), ("logger=[]: no such option; choose one of csv, tensorboard, trackio, wandb",)),
    (("logger=null",), ("logger=null: no such option; choose one of csv, tensorboard, trackio, wandb",)),
    (("model.depth=-1",), ("model.depth=-1: must be in 1 … 1000",)),
    (
        ("model.layers=[stu,attention]", "model.depth=1"),
        ("model.depth=1: must be at least 2, so that each of the 2 layers has a block",),
    ),
    (
        ("model.layers=[stu,lru]", "model.depth=2", "model.mixers.lru.r_min=2"),
        ("model.mixers.lru.r_min=2: must be",),
    ),
    (("model.mixer.num_filters=5000",), ("model.mixer.num_filters=5000: must be in 1 … ",)),
    (("model.dropout=1.5",), ("model.dropout=1.5: must be in [0, 1)",)),
    (("optimizer.lr=-1",), ("optimizer.lr=-1: must be above 0",)),
    (("optimizer.warmup=20",), ("optimizer.warmup=20: must be in 0 … the step budget (20)",)),
    (("+optimizer.groups.a.match=m_z",), ("optimizer.groups.a.match=m_z: matches no parameter", "names are like")),
    (("+optimizer.groups.a={match: m_u, speed: 2}",), ("optimizer.groups.a.speed=2: no such key", "lr_scale")),
    (("loader.batch_size=41",), ("loader.batch_size=41: must be in 1 … 40 training examples",)),
    (("log_every=0",), ("log_every=0: must be at least 1",)),
    (("checkpoints.every_n_steps=0",), ("checkpoints.every_n_steps=0: must be at least 1",)),
    (("trainer.max_epochs=null",), ("trainer.max_steps=-1", "max_steps or max_epochs")),
    (("trainer.devices=0",), ("trainer.devices=0: must be 1 … ",)),
    (("trainer.devices=-3",), ("trainer.devices=-3: must be 1 … ", "auto")),
    (("name=.lock",), ("name='.lock': must be a plain folder name that does not start with a dot",)),
    (("name=" + "a" * 300,), ("has 300 bytes; at most 240",)),
    (("trainer.limit_test_batches=0.01",), ("limit_test_batches=0.01: must be at least 0.333: there are 3 batches",)),
    (("trainer.val_check_interval=inf",), ("trainer.val_check_interval=inf: must be above 0 and finite",)),
    (("trainer.max_epochs=1e30",), ("trainer.max_epochs=1e+30: must be at most 1,000,000,000 optimiser steps",)),
    (("+trainer.limit_predict_batches=1",), ("limit_predict_batches=1: nothing here depends on it",)),
    (("optimizer.warmup=1.5",), ("optimizer.warmup=1.5: must be a share below 1, or whole steps",)),
    (("optimizer.eps=inf",), ("optimizer.eps=inf: must be at least 0 and finite",)),
    (("+optimizer.groups.a={match: m_u, lr_scale: inf}",), ("groups.a.lr_scale=inf: makes lr inf",)),
    (("loader.num_workers=1000000",), ("loader.num_workers=1000000: must be in 0 … ",)),
    (("task.data.test=1000000000000",), ("task.data.test=1000000000000: needs ", " GiB of memory; there are ")),
    (("~trainer.precision",), ("~trainer.precision: is needed",)),
    (("model.d_model=1000000000",), ("model.d_model=1000000000: is too large",)),
    (("model.mixer.k_u=1000000",), ("model.mixer.k_u=1000000: must be in 0 … 64",)),
    (("model.mixer.seq_len=32",), ("model.mixer.seq_len=32: is below the input's 64 steps",)),
    (("hydra/launcher=joblib",), ("hydra/launcher=joblib: not installed; choose one of basic, local, ray, slurm",)),
    (("hydra.run.dir=/proc/nope",), ("/proc/nope",)),
    (("name=..",), ("name=", "must be a plain folder name")),
    (("name=a/b",), ("name=", "must be a plain folder name")),
    (("+trainer.logger=true",), ("trainer.logger=True", "train.py sets it itself")),
    (("trainer.gradient_clip_val=-1",), ("trainer.gradient_clip_val=-1", "above 0")),
    (("model.mixer=null",), ("model.mixer=None", "must be a function that makes a Mixer")),
    (("task.data.radius=2",), ("task.data.radius=2: must be above 0 and at most 1",)),
    (("paths.runs=/dev/null",), ("paths.runs=/dev/null/lds/stu", "must be a folder to write to")),
    (("~loader.batch_size",), ("~loader.batch_size: is needed",)),
    (("~seed",), ("seed=absent: is needed",)),
    (("mode=test", "name=never"), ("checkpoint=", "never/checkpoints/best.ckpt: no such file", "train first")),
]

# What the words of the command themselves show, before anything is composed from them.
WORDS: Refused = [
    (("",), ("override='': is empty",)),
    (("seed=[1",), ("override=seed=[1: cannot be read",)),
    (("task=[lds]",), ("task=['lds']: no such option; did you mean lds?",)),
    (("model=../model/stu",), ("model=../model/stu: no such option",)),
    (("--resolve",), ("flags=--resolve: only with --cfg",)),
    (("--nope",), ("flags=--nope: no such flag",)),
    (("paths.runs=",), ("paths.runs='': is empty: name a folder",)),
    (("-m", "model=glob(STU)"), ("model=glob(STU): matches no option; choose from gated_deltanet",)),
    (("experiment=null",), ("experiment=null: no such option; did you mean none? choose",)),
    (("~experiment",), ("override=~experiment: cannot be removed; experiment=none is no preset",)),
    (("-m", "seed=range(5,1)"), ("seed=range(5,1): is an empty range",)),
    (("-m", "model=stu,_backbone"), ("model=_backbone: no such option",)),
]

COMMANDS = [case for case in EARLY if case[0][0] in AS_COMMANDS] + LATE + WORDS[::5]


def named(cases: Refused) -> list:
    return [pytest.param(*case, id=" ".join(case[0])) for case in cases]


@pytest.mark.parametrize(("overrides", "parts"), named(EARLY))
def test_the_line_about_a_configuration(
    overrides: tuple[str, ...], parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.argv", ["train.py", "task=lds", *overrides])
    line, config = None, None
    try:
        config = composed("task=lds", *overrides)
        check(config)
    except Exception as error:
        line = errors._line(error, config)
    assert line is not None
    assert "\n" not in line
    for part in parts:
        assert part in line


@pytest.mark.parametrize(("overrides", "parts"), named(WORDS))
def test_the_line_about_words(overrides: tuple[str, ...], parts: tuple[str, ...]):
    with pytest.raises(OptionError) as error:
        arguments.checked(overrides)
    line = errors._line(error.value, None)
    assert line is not None
    assert all(part in line for part in parts), line


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize(
    ("overrides", "parts"), named([c for c in EARLY if c[0][0] in AS_COMMANDS] + LATE + WORDS[::5])
)
def test_one_line_says_what_is_wrong_and_what_is_allowed(home: Any, overrides: tuple[str, ...], parts: tuple[str, ...]):
    done = runs.train(home, *SMALL_LDS, *overrides)
    assert_one_line(done, *parts)
    assert not list(home.glob("runs/lds/stu/*"))


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ("model=transformer", "task=lds", "model.mixer.causal=false"),
            ("task.causal=True: the model looks ahead", "causal one"),
        ),
        (
            ("model=stu", "task=lra_listops", "task.data.source=/proc/nonexistent"),
            ("task.data.source=/proc/nonexistent: must be a folder with basic_train.tsv", "No such file"),
        ),
        (
            ("model=stu", "task=lra_listops", "task.seq_len=32", "model.mixer.num_filters=4"),
            ("task.seq_len=32: must be at least 59",),
        ),
    ],
    ids=lambda part: " ".join(part),
)
def test_model_and_task_have_to_fit(home: Any, overrides: tuple[str, ...], parts: tuple[str, ...]):
    assert_one_line(runs.train(home, *runs.small(*overrides)), *parts)


def assert_one_line(done: runs.Finished, *parts: str) -> None:
    assert done.code == errors.USAGE, done.out
    assert len(done.err.splitlines()) == 1, done.err
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err
    for part in parts:
        assert part in done.err


@pytest.mark.slow
@pytest.mark.e2e
def test_a_shell_sees_the_same_and_tracebacks_when_it_asks_for_them(home: Any):
    """With an interpreter of its own, as everybody starts it."""
    assert_one_line(runs.train_in_subprocess(home, *SMALL_LDS, "model.depth=-1"), "model.depth=-1: must be in 1")
    done = runs.train(home, *SMALL_LDS, "model.depth=-1", HYDRA_FULL_ERROR="1")
    assert done.code not in (0, errors.USAGE)
    assert "Traceback" in done.err
    assert "OptionError: depth=-1" in done.err
    done = runs.train(home, "model=stuu", HYDRA_FULL_ERROR="1")
    assert done.code not in (0, errors.USAGE)
    assert "Traceback" in done.err


def test_a_glob_stands_for_the_options_that_can_be_chosen(monkeypatch: pytest.MonkeyPatch):
    words = arguments.checked(["seed=1", "-m", "model=glob(*,exclude=[s*])", "name=${now:%d}"])
    assert words == [
        "seed=1",
        "model=gated_deltanet,gru,linoss,lru,lstm,mamba2,mamba2_attention,mega,transformer",
        "name=${now:%d}",
        "-m",
    ]
    monkeypatch.setenv("STU_RUNS", " ")
    with pytest.raises(OptionError, match="STU_RUNS='': is empty"):
        arguments.checked([])


@pytest.mark.slow
@pytest.mark.e2e
def test_what_is_no_users_fault_keeps_its_traceback(home: Any):
    done = runs.train(home, *SMALL_LDS, at=runs.signalled(0, "stu.training.plan:StepPlan.make", 1))
    assert done.code == 0  # the hook itself is harmless …
    done = runs.train(home, *SMALL_LDS, "name=other", at=broken)
    assert done.code == 1
    assert "ZeroDivisionError" in done.err
    assert "Traceback" in done.err


def broken() -> None:
    """A fault of the code."""
    from stu.training import StepPlan

    StepPlan.make = lambda **options: 1 // 0  # type: ignore[method-assign, assignment]


@pytest.fixture(scope="module")
def help_text(home: Any) -> str:
    done = runs.train(home, "--help")
    assert (done.code, done.err) == (0, "")
    return done.out


@pytest.mark.slow
@pytest.mark.e2e
def test_help_lists_every_option_of_every_group(help_text: str):
    groups = {folder.name for folder in CONF.iterdir() if folder.is_dir()} - {"__pycache__", "hydra"}
    groups -= BY_OTHERS
    assert len(groups) >= 6
    for group in groups:
        # what the group is, and below it the options, farther in
        [(meaning, options)] = re.findall(rf"^  {group} +(\S.*)\n((?: {{16}}\S.*\n)+)", help_text, re.MULTILINE)
        files = (CONF / group).rglob("*.yaml")
        names = {f.relative_to(CONF / group).with_suffix("").as_posix() for f in files if f.name[0] != "_"}
        assert {name for option in re.split(r",\s+", options.strip()) for name in unfolded(option)} == names
        assert not meaning.startswith(tuple(names))


def unfolded(option: str) -> list[str]:
    """The names that a shell makes of a/{b,c}/{d,e}."""
    parts = [part.split(",") for part in re.split(r"[{}]", option)]
    return ["".join(choice) for choice in product(*parts)]


def test_names_are_abbreviated_only_where_folders_hold_the_same():
    assert folded(["a", "b"]) == ["a", "b"]
    assert folded(["x/a", "x/b", "y/a", "y/b", "q"]) == ["q", "{x,y}/{a,b}"]
    assert folded(["x/a", "x/b", "y/a"]) == ["x/{a,b}", "y/a"]
    assert folded(["l/x/a", "l/x/b", "l/y/a", "l/y/b"]) == ["l/{x,y}/{a,b}"]


@pytest.mark.slow
@pytest.mark.e2e
def test_the_examples_of_help_work(help_text: str):
    commands = re.findall(r"^  python train\.py (.*?)(?:   .*)?$", help_text, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        overrides = shlex.split(command)
        assert ("-m" in overrides) == any("," in override or override.startswith("sweep=") for override in overrides)
        first = [override.split(",")[0] for override in overrides if override != "-m"]
        check(composed(*first))


@pytest.mark.slow
@pytest.mark.e2e
def test_the_whole_configuration_can_be_seen(home: Any):
    done = runs.train(home, *SMALL_LDS, "--cfg", "job", "--resolve")
    assert (done.code, done.err) == (0, "")
    shown = yaml.safe_load(done.out)
    assert "${" not in done.out
    assert shown["model"]["mixer"]["seq_len"] == shown["task"]["data"]["seq_len"] == 64
    assert shown["paths"]["runs"] == str(home / "runs")
    assert not list(home.glob("*.log"))  # looking writes nothing
    assert not (home / "outputs").exists()


class TestCheck:
    """The same checks without a process, where a detail is worth a case of its own."""

    def test_nothing_is_wrong_with_a_preset(self):
        check(composed("model=stu", "task=lds"))

    @pytest.mark.parametrize(
        "override",
        ["name=12", "name=abc", "trainer.max_epochs=0.5", "trainer.max_epochs=null", "optimizer.lr=1"],
    )
    def test_what_is_allowed(self, override: str):
        check(composed("task=lds", override))

    def test_the_first_argument_of_what_a_mixer_makes_is_the_users(self):
        factory = {"_target_": "torch.nn.LeakyReLU", "_partial_": True, "negative_slope": 0.1}
        check_call("model.mixer.activation", factory)
        with pytest.raises(OptionError, match=r"model\.mixer\[1\]\.d_model=3: no such key"):
            check_call("model.mixer[1]", {"_target_": "stu.mixers.lru.LRU", "_partial_": True, "d_model": 3})

    def test_a_root_key_that_a_preset_misspells(self):
        """Hydra merges it without a word."""
        config = composed("task=lds").copy()
        OmegaConf.set_struct(config, False)
        config.optimiser = {"lr": 1e-3}
        with pytest.raises(OptionError, match=r"optimiser=.*: no such key; did you mean optimizer\?"):
            check(config)

    def test_an_empty_mixer_is_missing(self):
        config = composed("task=lds").copy()
        config.model.mixer = "???"
        with pytest.raises(Exception, match=r"mixer"):
            check(config)

    @pytest.mark.parametrize(
        ("name", "value", "key"),
        [
            ("seed", 1, "seed"),
            ("lr", 1e-3, "optimizer.lr"),
            ("groups.a", {"lr": 1}, "optimizer.groups.a"),
            ("dropout", 0.25, "model.dropout"),
            ("nowhere", 1, "nowhere"),
        ],
    )
    def test_a_refused_keyword_is_found_in_the_configuration(self, name: str, value: object, key: str):
        config = composed("task=lds", "seed=1", "+optimizer.groups.a={lr: 1}", "model.dropout=0.25", "task.data.seed=2")
        line = errors._line(OptionError(name, value, "no"), config)
        assert line == f"{key}={value}: no"


@settings(max_examples=50)
@given(st.one_of(st.text(max_size=20), st.text("ab'\"\\${},=~ \n", max_size=8)))
@example("null")
@example("a, b")
@example("~/x")
def test_a_prompt_is_taken_as_it_stands(prompt: str):
    word = at_home(f"prompt={prompt}")
    value = OverridesParser.create().parse_override(word).value()
    read = OmegaConf.to_container(OmegaConf.create({"prompt": value}), resolve=True)["prompt"]
    quoted = len(prompt) > 1 and prompt[0] == prompt[-1] and prompt[0] in "'\""
    assert quoted or read == prompt


def test_a_prompt_in_quotes_is_what_they_hold():
    assert at_home("prompt='a b'") == "prompt='a b'"
    assert at_home(r"prompt='it\'s'") == r"prompt='it\'s'"
    assert at_home("""prompt="Yes," she said, "no.\"""") == """prompt='"Yes," she said, "no."'"""
