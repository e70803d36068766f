"""Wrong commands, generated: every key of every configuration, with every kind of wrong value.

    python -m tests.conf.wrong_commands [how many, 1200; 0 for all] [a part of them, for example model.] [-v]

Each must end within `SECONDS` in one line of error and exit code 2, without a traceback, and leave no file; or be no
wrong command after all: then it trains a step, tests and exits with 0. Values that can mean nothing anywhere (`NEVER`)
have to be refused.
"""

import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import DictConfig, OmegaConf

from stu.cli.usage import options_of
from tests import runs, sources
from tests.models import composed

SECONDS = 20.0
AT_ONCE = 2
NEVER = ("=nan", "=???", "=${nope}", "=-inf", "unknown=1")
VALUES = (
    *("null", "", "abc", "-1", "0", "1.5", "nan", "inf", "-inf", "1e30", "1e12", "1000000000000", "true"),
    *("[]", "[1,2]", "[abc]", "{}", "{a: 1}", "???", "${nope}", "/nonexistent", "ü"),
)
ONE_STEP = ("trainer.max_epochs=null", "trainer.max_steps=1", "trainer.limit_val_batches=1")

# Commands that no rule makes, of a small run.
OTHERS = """
pictures=null
figures=null
loader=null
checkpoints=null
optimizer=null
trainer=null
model=null
paths=null
logger=null
task=null
task=[lds]
model=[stu]
model=stu,lru
task.data=null
~task
~model
~loader
~trainer
~optimizer
~logger
~paths
~paths.runs
~checkpoints
~figures
~task.data
experiment=quick task=lds
experiment=[quick,quick]
experiment=[]
experiment=lra/listops
model=
task=
=
=1
seed
seed=
seed==1
=seed
model
model.depth
++
+
~
~~seed
--resolve
--run --multirun
--run -m seed=0,1
--cfg
--cfg nope
--cfg job --package nope
--info nope
--package model
--config-name nope
--config-name
--config-path nope
--config-dir nope
--config-dir /nonexistent
--experimental-rerun nope
--shell-completion
--nope
-x
-c
seed=1 --nope
hydra=null
hydra.run=null
hydra.run.dir=/proc/nope
hydra.job=null
hydra.sweep.dir=null
hydra.job.chdir=abc
hydra.nope=1
hydra.mode=nope
hydra.mode=MULTIRUN hydra/launcher=nope
hydra/launcher=joblib
hydra/sweeper=nope
hydra/launcher=
hydra/job_logging=nope
hydra/nope=nope
nope/launcher=joblib
-m hydra/launcher=joblib seed=0,1
-m model=glob(STU)
-m model=glob(nope*)
-m model=glob(*) model.depth=abc
-m seed=0,abc
-m seed=range(0,0)
-m seed=range(5,1)
-m seed=choice()
-m model=stu,stuu
-m task=lds,nope
-m model.depht=1,2
-m
-m seed=${nope},1
-m paths.runs=/proc/nope seed=0,1
-m paths.runs=/dev/null seed=0,1
-m seed=0,1 name=x
-m trainer.devices=2 seed=0,1
seed=0,1
seed=[0,1]
seed=glob(*)
seed=range(3)
seed=choice(1,2)
seed=1e5
seed=4294967296
seed='1'
seed="1
seed=[1
seed={a
seed=${
seed=${oc.env:NOPE}
optimizer.lr=${oc.env:LR}
optimizer.lr=${seed
optimizer.lr=${nope:1}
optimizer.lr=${optimizer.lr}
optimizer.lr=${oc.decode:"["}
model.depth=${seed}
model.depth=${optimizer.lr}
name=.lock
name=.
name=..
name=a/b
name=../x
name=/tmp
name=.hidden.lock
name=~
name=con\\nx
name=-x
name=@é260
name=@a300
name=${nope}
model=../model/stu
model=../task/lds
model=/stu
model=./stu
model=stu/
model=stu.yaml
model=_backbone
model=/etc/passwd
task=../task/lds
task=../../etc/passwd
task=_nope
optimizer=nope
optimizer=../optimizer/adamw
trainer=nope
trainer=gpu
trainer=GPU
logger=nope
logger=[wandb,nope]
logger.mode=offline
paths=nope
paths.runs=
paths.data=
paths.runs=/proc/nope
paths.runs=/dev/null
paths.runs=/nonexistent/../..//proc
paths.data=/proc/nope task=lorenz96
paths.data=/dev/null task=lorenz96
mode=test
mode=test checkpoint=/nonexistent
mode=test checkpoint=/etc/passwd
mode=test checkpoint=/tmp
mode=test checkpoint=/proc/nope
mode=test checkpoint=
mode=test overwrite=true
mode=test prompt=x
mode=generate
mode=generate task=language
mode=generate task=language checkpoint=/nonexistent
mode=generate task=language prompt=???
mode=generate task=language overwrite=true
mode=generate task=language generate.max_tokens=-1
mode=generate task=language generate.temperature=-1
mode=generate task=language generate.temperature=inf
mode=generate task=language generate.top_k=0
mode=generate task=language generate.top_p=0
mode=generate task=language generate.top_p=1.5
mode=generate task=language generate.seed=-1
mode=generate task=language generate={}
mode=generate task=language generate=null
mode=generate task=language generate.nope=1
prompt=x
generate.max_tokens=10
generate.top_k=3
task=language task.causal=false
task=language task.data.source=/nonexistent
task=language task.data.source=/dev/null
task=language task.data.source=/proc/self
task=language task.data.units=letters
task=language task.data.vocab_size=256
task=language task.data.val=1.0
task=language task.data.val=0
task=language task.data.val=0.6 task.data.test=0.5
task=language task.data.test=1000000000
mode=resume
checkpoint=/nonexistent
checkpoint=x overwrite=true
overwrite=1
overwrite=null
overwrite=yes
+seed=1
++nope=1
++model.nope=1
++loader.seed=3
+model=lru
+model@foo=stu
model@foo=stu
+experiment=quick
+checkpoints.monitor=loss
+checkpoints.directory=x
+loader.seed=3
+logger.name=x
+logger.wandb.run=x
+logger.wandb.names=[a,b]
+figures.directory=x
+optimizer.total_steps=9
+optimizer.named_parameters=[]
+optimizer.params=1
+model.mixer.d_model=3
+model.channel_mixer.d_model=3
+model.mixer._args_=[1]
+model._args_=[1,2]
+model._recursive_=false
+model._convert_=nope
+model._partial_=true
+task._partial_=true
+task._args_=[1]
+task.name=x
+task.data.name=x
+task.encoder=x
+trainer.logger=true
+trainer.callbacks=[]
+trainer.fast_dev_run=true
trainer.limit_train_batches=1.5
+trainer.limit_predict_batches=1
+trainer.profiler=simple
+trainer.profiler=nope
+trainer.plugins=nope
+trainer.plugins=[nope]
+trainer.num_nodes=0
+trainer.num_nodes=2
+trainer.num_nodes=abc
+trainer.inference_mode=abc
+trainer.sync_batchnorm=true
+trainer.model_registry=x
+trainer.enable_autolog_hparams=abc
+trainer.gradient_clip_algorithm=nope
trainer.overfit_batches=-1
+trainer.max_time=1
+trainer.min_steps=1
+trainer.detect_anomalies=true
+optimizer.groups.a=null
+optimizer.groups.a={}
+optimizer.groups.a={match: null}
+optimizer.groups.a={match: 3}
+optimizer.groups.a={match: "["}
+optimizer.groups.a={match: m_u, lr: nan}
+optimizer.groups.a={match: m_u, lr: inf}
+optimizer.groups.a={match: m_u, lr_scale: inf}
+optimizer.groups.a={match: m_u, lr: abc}
+optimizer.groups.a={match: m_u, weight_decay: nan}
+optimizer.groups.default={match: m_u}
+optimizer.groups.1={match: m_u, lr: 1}
optimizer.groups=[a]
optimizer.groups={a: 1}
optimizer.betas=[0.9,1.0]
optimizer.betas=[nan,0.9]
optimizer.betas=[-1,0.9]
optimizer.betas=[0.9,0.99,0.9]
optimizer.warmup=1.5
optimizer.warmup=7
optimizer.min_lr=1
optimizer._target_=torch.optim.AdamW
optimizer._target_=nope
optimizer._target_=os.system
optimizer._target_=null
optimizer._partial_=false
model._target_=stu.STU
model._target_=builtins.print
model._target_=null
model._target_=
~model._target_
~model.mixer._target_
~model.mixer
~model.mixer._partial_
~task._target_
~task.data._target_
~loader._target_
~trainer._target_
~trainer.max_steps
~trainer.precision
~trainer.matmul_precision
~trainer.accelerator
~trainer.gradient_clip_val
~trainer.limit_test_batches
~trainer.val_check_interval
~optimizer._target_
~optimizer._partial_
~optimizer.lr
~logger.wandb._target_
~logger.wandb.mode
~model.d_model
~model.depth
~model.norm
model.mixer={}
model.mixer=[]
model.mixer=[null]
model.mixer=[stu]
model.mixer=stu
model.mixer={_target_: stu.STU}
model.mixer={_target_: stu.STU, _partial_: true}
model.mixer={_target_: stu.nope, _partial_: true}
model.mixer={_target_: torch.nn.Linear, _partial_: true}
model.mixer={_target_: torch.nn.Linear, _partial_: true, out_features: 8}
model.mixer={_target_: builtins.dict, _partial_: true}
model.mixer._partial_=false
model.mixer._partial_=null
model.channel_mixer={}
model.channel_mixer=abc
model.channel_mixer={_target_: torch.nn.Linear, _partial_: true}
model.channel_mixer={_target_: torch.nn.Linear, _partial_: true, out_features: 3}
model.channel_mixer={_target_: stu.STU, _partial_: true}
model.channel_mixer._target_=stu.STU
model.channel_mixer._partial_=false
task.data={}
task.data=abc
task.data=[]
task.data._target_=data.memory.copying.CopyingData
task.data._target_=stu.STU
task.data._target_=data.nope
task._target_=stu.Backbone
task._target_=data.systems.lds.LDSData
trainer._target_=stu.STU
trainer._target_=nope
loader._target_=nope
checkpoints._target_=nope
figures._target_=stu.STU
logger.wandb._target_=nope
loader.batch_size=41
loader.batch_size=3 trainer.accumulate_grad_batches=2
loader.num_workers=100000
loader.num_workers=1000000
loader.device_resident=abc
trainer.accumulate_grad_batches=1000000
trainer.limit_test_batches=0.01
trainer.limit_val_batches=0.01
trainer.limit_val_batches=0.01 mode=test
trainer.limit_test_batches=0.01 mode=test
trainer.limit_test_batches=-1
trainer.limit_test_batches=1.5
trainer.limit_test_batches=true
trainer.limit_val_batches=2.5
trainer.val_check_interval=null
trainer.val_check_interval=abc
trainer.val_check_interval=inf
trainer.val_check_interval=1e300
trainer.val_check_interval=true
trainer.max_epochs=inf
trainer.max_epochs=1e300
trainer.max_epochs=nan
trainer.max_steps=1e3
trainer.max_steps=0
trainer.max_steps=-2
trainer.devices=0
trainer.devices=-3
trainer.devices=1000
trainer.devices=[0]
trainer.devices=[7]
trainer.devices=[]
trainer.devices="0,1"
trainer.devices=abc
trainer.devices=1.5
trainer.devices=true
trainer.accelerator=tpu
trainer.accelerator=mps
trainer.accelerator=cuda
trainer.accelerator=hpu
trainer.accelerator=null
trainer.strategy=fsdp
trainer.strategy=ddp_spawn
trainer.strategy=deepspeed
trainer.precision=16-mixed
trainer.precision=transformer-engine
trainer.precision=transformer-engine-float16
trainer.precision=8
trainer.precision=32
trainer.precision=64
trainer.precision=16
trainer.precision=bf16
trainer.precision=16-true
trainer.precision=null
trainer.num_sanity_val_steps=-1
trainer.num_sanity_val_steps=-2
trainer.deterministic=warn
trainer.deterministic=nope
trainer.gradient_clip_val=true
model.mixer.num_filters=65
model.mixer.num_filters=1000000
model.mixer.k_u=1000000
model.mixer.k_u=1000000000000
model.mixer.k_y=1000000
model.mixer.delay=1000000
model.mixer.delay=1000000000000
model.mixer.hankel=L
model.mixer.seq_len=32
model.mixer.seq_len=1000000000000
model.mixer.causal=false
model.mixer.causal=null
model.d_model=0
model.d_model=1000000000
model.d_model=1000000000000
model.d_model=100000000000000000000
model.depth=1000000
model.depth=1000000000000
model.depth=100000000000000000000
model.dropout=1
model.dropout=-0.1
model.positions=rotary
model.positions=learned model.seq_len=0
model.positions=learned model.seq_len=1000000000000
model.positions=learned model.seq_len=8
model.positions=sinusoidal model.seq_len=-1
model.channel_mixer=null model.channel_residual=true
model.compile=abc
model=lstm model.compile=true
model=lru model.mixer.d_state=1000000000000
model=lru model.mixer.d_state=1000000000
model=lru model.mixer.r_min=1
model=lru model.mixer.r_max=2
model=s4 model.mixer.d_state=1000000000000
model=s4 model.mixer.d_state=7
model=s4 model.mixer.d_state=100000
model=s4d model.mixer.d_state=1000000000000
model=s4d model.mixer.dt_max=inf
model=s5 model.mixer.d_state=1000000000000 model.mixer.num_blocks=1
model=s5 model.mixer.d_state=100000 model.mixer.num_blocks=1
model=s5 model.mixer.dt_max=inf
model=mamba2 model.mixer.d_state=1000000000000
model=mamba2 model.mixer.d_conv=1000000000000
model=mamba2 model.mixer.d_conv=1000
model=mamba2 model.mixer.dt_max=inf
model=mamba2 model.mixer.dt_min=nan
model=mamba2 model.mixer.A_init_range=[1,inf]
model=mamba2 model.mixer.A_init_range=[nan,1]
model=mamba2 model.mixer.dt_limit=[inf,inf]
model=mamba2 model.mixer.dt_limit=[0,nan]
model=lstm model.mixer.d_state=1000000000000
model=gru model.mixer.d_state=1000000000
model=gru model.mixer.cell=nope
model=transformer model.mixer.dropout=2
model=transformer model.mixer.dropout=-1
model=transformer model.mixer.dropout=1
model=transformer model.mixer.num_heads=3
model=transformer model.mixer.num_heads=0
model=transformer model.mixer.window=0
model=transformer model.mixer.window=1000000000000
model=transformer model.mixer.positions=bogus
model=transformer model.positions=bogus
model=transformer model.positions=rotary model.mixer.num_heads=8
model=transformer model.channel_mixer.expand=1e12
model=transformer model.channel_mixer.expand=inf
model=transformer model.channel_mixer.expand=nan
model=transformer model.channel_mixer.dropout=2
model=transformer task=lds model.mixer.causal=false
task=lra_listops task.vocab_size=100000000000
task=lra_listops task.vocab_size=3
task=lra_text task.vocab_size=100000000000
task=lds task.seq_len=1000000000000
task=lds task.seq_len=0
task=lds task.data.seq_len=32
task=lds task.causal=false
task=lds task.data.d_state=1000000000
task=lds task.data.d_input=1000000000
task=lds task.data.d_output=1000000000
task=lds task.data.d_output=1000000000000
task=lds task.data.train=1000000000000
task=lds task.data.test=1000000000000
task=lds task.data.spectrum=complex task.data.d_state=3
""".strip().splitlines()


@dataclass(frozen=True)
class Outcome:
    """A command, and what it did."""

    command: tuple[str, ...]
    code: int | None  # None: it was killed
    out: str
    err: str
    left: tuple[str, ...]  # files
    seconds: float

    @property
    def worked(self) -> bool:
        """Whether it was no wrong command."""
        return self.code == 0 and "Traceback" not in self.err

    @property
    def fault(self) -> str:
        """What is wrong with the answer; empty if nothing is."""
        # a sweep has a line for each job that failed, and a list of these
        swept = {"-m", "--multirun"} & set(self.command)
        lines = self.err.splitlines()[: 1 if swept else None]
        if self.code is None:
            return f"still running after {self.seconds:.0f} s"
        if "Traceback" in self.err:
            return "traceback"
        if self.worked:
            return "accepted" if any(self.command[-1].endswith(end) for end in NEVER) else ""
        if swept and self.code == 1 and "jobs of the sweep failed" in self.err:
            return ""  # others may have worked
        if self.code != 2:
            return f"exit code {self.code}"
        if len(lines) != 1 or not lines[0].startswith("error: ") or not lines[0][7:].strip():
            return f"{len(lines)} lines"
        return "left files" if self.left else ""


def commands(count: int | None = None, seed: int = 0) -> list[tuple[str, ...]]:
    """`OTHERS`, and of the generated ones so many that there are `count`, the same ones each time; None: all."""
    base = ("task=lds", "model=stu")
    others = [(*base, *_words(line)) for line in OTHERS]
    made = list(generated())
    if count is not None:
        random.Random(seed).shuffle(made)
        made = made[: max(0, count - len(others))]
    return [*others, *made]


def generated() -> Iterator[tuple[str, ...]]:
    """Every key of every task, of every model and of the rest of the configuration with every wrong value."""
    parts = [("task", ("model=stu", f"task={task}")) for task in options_of("task")]
    parts += [("model", ("task=lds", f"model={model}")) for model in options_of("model")]
    parts += [("", ("task=lds", "model=stu"))]
    parts += [("logger", ("task=lds", "model=stu", "logger=wandb"))]
    for part, base in parts:
        config = composed(*base)
        node = OmegaConf.select(config, part) if part else config
        for key, value in _keys(node, part):
            if not part and key.split(".")[0] in ("task", "model"):
                continue
            if isinstance(value, DictConfig):
                yield (*base, f"+{key}.unknown=1")
            if key:
                yield from ((*base, f"{key}={wrong}") for wrong in VALUES)
                yield (*base, f"~{key}")


def attempt(home: Path, command: Sequence[str], shared: Path | None = None, *, seconds: float = SECONDS) -> Outcome:
    """Run a small training by this command, for so many seconds at most.

    shared: where data caches and sources lie, which count as no files that are left.
    """
    shared = shared or home
    words = _small(tuple(word for word in command if re.match(r"(task|model)=\w+$", word)), shared)
    given = {word.split("=", 1)[0] for word in command}
    known = {"trainer", *given}
    flags = [word for word in command if word.startswith("-")]
    rest = [word for word in command if not word.startswith("-")]
    if flags and flags[0] not in ("-m", "--multirun"):
        arguments = [*(w for w in words if w.split("=")[0] not in known), *command]
    else:
        arguments = [*flags, *(w for w in words if w.split("=")[0] not in known), *rest]
    start = time.perf_counter()
    environment = {"STU_DATA": str(shared / "data"), "STU_CACHE": str(shared / "cache"), "WANDB_MODE": "disabled"}
    started = runs.start(home, *arguments, **environment)
    try:
        done = started.wait(seconds)
        code: int | None = done.code
    except TimeoutError:
        done, code = runs.Finished(-1, started.out.read_text(), started.err.read_text()), None
    taken = time.perf_counter() - start
    ours = (started.out.parent, home / "runs" / ".sweeps")  # Hydra's notes on sweeps
    left = [path for path in home.rglob("*") if path.is_file() and not set(ours) & set(path.parents)]
    names = tuple(str(path.relative_to(home)) for path in left)
    return Outcome(tuple(command), code, done.out, done.err, names, taken)


@cache
def _small(choices: tuple[str, ...], shared: Path) -> list[str]:
    """What makes the run small."""
    kept = {choice.split("=")[0]: choice for choice in ("task=lds", "model=stu", *choices)}
    task = kept["task"].removeprefix("task=")
    try:
        small = runs.small(kept["task"], kept["model"], "trainer.max_epochs=null")
    except Exception:  # options that do not exist: what is tried
        return []
    return [*small[:-3], "trainer=cpu", *ONE_STEP, *sources.overrides(task, shared)]


def _words(line: str) -> list[str]:
    """The arguments in a line of `OTHERS`: a space ends one outside of brackets; @x9 is x nine times."""
    if not line:
        return [""]
    words = re.findall(r"(?:\{[^}]*\}?|[^ ])+", line)
    return [re.sub(r"@(.)(\d+)", lambda match: match[1] * int(match[2]), word) for word in words]


def _keys(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    yield key, node
    if isinstance(node, DictConfig):
        for name in node:
            value = None if OmegaConf.is_missing(node, name) else node[name]
            yield from _keys(value, f"{key}.{name}" if key else str(name))


def main(count: int = 1200, part: str = "", *, verbose: bool = False) -> int:
    """Try them, show the faults and return their number."""
    runs._server.set_forkserver_preload([*runs.PRELOADED, "torch._dynamo", "stu.training", "stu.mixers"])
    chosen = [command for command in commands(count or None) if part in " ".join(command)]
    kinds: Counter[str] = Counter()
    slowest = 0.0
    with TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        homes = (Path(folder) / str(number) for number in range(len(chosen)))
        for outcome in pool.map(lambda home, command: attempt(home, command, Path(folder)), homes, chosen):
            slowest = max(slowest, outcome.seconds)
            kind = "fault" if outcome.fault else "worked" if outcome.worked else "refused"
            kinds[kind] += 1
            if outcome.fault or verbose:
                last = (outcome.err.strip().splitlines() or [""])[-1]
                print(f"{outcome.fault or kind}: {' '.join(outcome.command)}\n    {last[:300]}", flush=True)
    print(f"{len(chosen)} commands: {dict(kinds)}; the slowest took {slowest:.1f} s")
    return kinds["fault"]


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "-v"]
    number = int(words.pop(0)) if words and words[0].isdigit() else 1200
    raise SystemExit(min(1, main(number, *words, verbose="-v" in sys.argv)))
