"""How long a run is and when it validates, counted in optimiser steps."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import Accelerator, CUDAAccelerator, MPSAccelerator, XLAAccelerator
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from stu.errors import OptionError, require
from stu.training.cluster import Launcher, Started, check_processes, environments
from stu.training.sharded import FullyShard

# Arguments of a Trainer that would end or shorten a run without its `StepPlan` knowing.
UNSUPPORTED = (
    "min_epochs",
    "min_steps",
    "max_time",
    "fast_dev_run",
    "check_val_every_n_epoch",
    "reload_dataloaders_every_n_epochs",
)
# Arguments of a Trainer that nothing here reads.
UNREAD = ("limit_predict_batches", "sync_batchnorm", "model_registry", "enable_autolog_hparams")
MOST_STEPS = 10**9  # of a run, which even at a millisecond each takes eleven days
# Arguments of a Trainer that train.py passes itself.
PASSED = (
    "logger",
    "callbacks",
    "default_root_dir",
    "log_every_n_steps",
    "barebones",
    "enable_progress_bar",
    "enable_checkpointing",
    "enable_model_summary",
    "use_distributed_sampler",
)
SHARDED_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", 32, "bf16")  # that Lightning has for `FullyShard`
# What this machine must have for an `accelerator`.
ACCELERATORS = {
    "gpu": (CUDAAccelerator, MPSAccelerator),
    "cuda": (CUDAAccelerator,),
    "mps": (MPSAccelerator,),
    "tpu": (XLAAccelerator,),
}


def check_trainer(arguments: Mapping[str, Any], make: partial[L.Trainer], *, sweeping: bool = False) -> None:
    """Raise `OptionError` for arguments of a Trainer that a run does not support or this machine does not have.

    A Trainer is made from them as a trial, and its processes compared with those that were started for this command,
    so that nothing is refused after the data have been prepared. sweeping: the command has several jobs.
    """
    for key in (*UNSUPPORTED, *PASSED):
        reason = "set max_epochs or max_steps" if key in UNSUPPORTED else "train.py sets it itself"
        require(key not in arguments, f"trainer.{key}", arguments.get(key), f"not supported; {reason}")
    for key in UNREAD:
        require(key not in arguments, f"trainer.{key}", arguments.get(key), "nothing here depends on it")
    clip = arguments["gradient_clip_val"]
    allowed = "must be above 0 and finite, or null"
    require(clip is None or 0 < clip < math.inf, "trainer.gradient_clip_val", clip, allowed)
    for key in ("limit_val_batches", "limit_test_batches"):
        limit = arguments[key]
        allowed = "must be above 0 (a checkpoint is chosen and tested): a share up to 1.0, or a number of batches"
        fits = limit is None or 0 < limit <= (1 if isinstance(limit, float) else math.inf)
        require(fits, f"trainer.{key}", limit, allowed)
    tried = arguments.get("num_sanity_val_steps")
    require(tried is None or tried >= -1, "trainer.num_sanity_val_steps", tried, "must be at least 0, or -1 for all")
    accelerator, devices, nodes = arguments["accelerator"], arguments["devices"], arguments.get("num_nodes", 1)
    present = accelerator not in ACCELERATORS or has(*ACCELERATORS[accelerator])
    missing = "GPU" if accelerator in ("gpu", "cuda") else str(accelerator).upper()
    require(present, "trainer.accelerator", accelerator, f"there is no {missing} here; use trainer=cpu")
    require(nodes >= 1, "trainer.num_nodes", nodes, "must be at least 1")
    if accelerator == "cpu" or (accelerator == "auto" and not has(CUDAAccelerator, MPSAccelerator, XLAAccelerator)):
        cores, precision = os.cpu_count() or 1, arguments["precision"]
        fits = devices == "auto" or (str(devices).isdecimal() and 1 <= int(devices) <= cores)
        require(fits, "trainer.devices", devices, f"must be 1 … {cores} (the CPU cores here) or auto, which is 1")
        allowed = "needs a GPU; a CPU computes in 32-true, bf16-mixed or 64-true"
        require(precision not in ("16-mixed", 16), "trainer.precision", precision, allowed)
    elif isinstance(devices, Sequence) and not isinstance(devices, str):
        unlike = 0 < len(devices) == len(set(devices))
        require(unlike, "trainer.devices", devices, "must be how many, or a list of unlike GPUs")
    else:
        require(str(devices) not in ("0", "-0"), "trainer.devices", devices, "must be above 0, or auto for all")
    if isinstance(make.keywords["strategy"], FullyShard):
        allowed = f"must be one of {', '.join(map(str, SHARDED_PRECISIONS))} where weights are divided"
        require(arguments["precision"] in SHARDED_PRECISIONS, "trainer.precision", arguments["precision"], allowed)
    trial = make_trainer(make, logger=False, enable_progress_bar=False, enable_checkpointing=False)
    check_processes(trial, sweeping=sweeping)


def has(*kinds: type[Accelerator]) -> bool:
    """Whether this machine has any of these."""
    return any(kind.is_available() for kind in kinds)


def make_trainer(make: partial[L.Trainer], **arguments: Any) -> L.Trainer:
    """A Trainer for runs with a `StepPlan`, after setting its `matmul_precision`, which is ours.

    Raises `OptionError` with Lightning's objection to what was configured.
    """
    configured = dict(make.keywords)
    arguments["callbacks"] = [*arguments.get("callbacks", ()), Started()]
    configured["plugins"] = [*environments(), *(configured.get("plugins") or ())]
    set_matmul_precision(configured.pop("matmul_precision", "high"), on_gpu=configured.get("accelerator") != "cpu")
    try:
        trainer = make.func(**configured | StepPlan.trainer_arguments | arguments)
    except (TypeError, ValueError, LookupError, ImportError, MisconfigurationException) as error:
        asked = {key: configured.get(key) for key in ("accelerator", "devices", "strategy", "precision")}
        raise OptionError("trainer", asked, f"Lightning refuses this: {error}".partition("\n")[0]) from error
    launcher = getattr(trainer.strategy, "launcher", None)
    if isinstance(launcher, _SubprocessScriptLauncher):
        started = launcher.cluster_environment, launcher.num_processes, launcher.num_nodes
        trainer.strategy._launcher = Launcher(*started)
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]  # ours do
    return trainer


def set_matmul_precision(precision: str, *, on_gpu: bool) -> None:
    """How float32 products are computed in this process, on a GPU: "highest" in float32, "high" in TF32.

    "medium" lets PyTorch use bfloat16 inside where it has such kernels. Convolutions and recurrent networks of cuDNN,
    which PyTorch computes in TF32 by default, follow. A CPU always gets "highest", so that its results depend neither
    on this nor on the kernels that it has. FFTs, float64 and what is no product are never affected.
    """
    precision = precision if on_gpu and torch.cuda.is_available() else "highest"
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"


@dataclass(frozen=True)
class StepPlan:
    """The whole run is one pass over `total_steps` · `accumulate` batches.

    Lightning's epoch is not used: what it counts as one epoch is the run, so that a run can stop and resume at any
    step. An epoch here is `steps_per_epoch` optimiser steps, one pass over the training data, or over what is left of
    it: the first batches of each epoch, or where it `overfits`, of the first epoch alone, which are validated, too.
    """

    # What a Trainer is given instead: one pass over all batches, validated when `Checkpoints` says so, and divided
    # over devices by the data module.
    trainer_arguments: ClassVar[dict[str, Any]] = {
        "max_epochs": 1,
        "max_steps": -1,
        "val_check_interval": 1.0,
        "limit_train_batches": 1.0,
        "overfit_batches": 0.0,
        "use_distributed_sampler": False,
        "enable_model_summary": False,
    }

    total_steps: int
    steps_per_epoch: int
    val_every: int
    accumulate: int
    overfits: bool = False

    @classmethod
    def of_trainer(cls, arguments: Mapping[str, Any], *, examples: int, batch_size: int) -> "StepPlan":
        """The plan that the arguments of a Trainer ask for."""
        limits = ("max_epochs", "max_steps", "val_check_interval", "accumulate_grad_batches")
        given = {key: arguments[key] for key in (*limits, "limit_train_batches", "overfit_batches") if key in arguments}
        return cls.make(examples=examples, batch_size=batch_size, **given)

    @classmethod
    def make(
        cls,
        *,
        examples: int,
        batch_size: int,
        max_epochs: float | None,
        max_steps: int,
        val_check_interval: float,
        accumulate_grad_batches: int,
        limit_train_batches: float | None = None,
        overfit_batches: float = 0,
    ) -> "StepPlan":
        """Translate Lightning's arguments, with their meaning, into steps.

        The shorter of `max_epochs` and `max_steps` (−1 for no limit) counts. `val_check_interval` and the limits are
        shares of an epoch if floats, numbers of batches if integers; `val_check_interval` of the epoch that is left.
        """
        require(1 <= batch_size <= examples, "batch_size", batch_size, f"must be in 1 … {examples} training examples")
        require(accumulate_grad_batches >= 1, "accumulate_grad_batches", accumulate_grad_batches, "must be at least 1")
        allowed = "must be above 0 and finite, or null for no limit"
        require(max_epochs is None or 0 < max_epochs < math.inf, "max_epochs", max_epochs, allowed)
        require(max_steps >= 1 or max_steps == -1, "max_steps", max_steps, "must be at least 1, or -1 for no limit")
        allowed = "must be above 0 and finite"
        require(0 < val_check_interval < math.inf, "val_check_interval", val_check_interval, allowed)
        steps_per_epoch, overfits = examples // batch_size, overfit_batches != 0
        allowed = "must be null with overfit_batches, which limits training itself"
        require(limit_train_batches is None or not overfits, "limit_train_batches", limit_train_batches, allowed)
        if overfits:
            steps_per_epoch = _limited(steps_per_epoch, accumulate_grad_batches, "overfit_batches", overfit_batches)
        elif limit_train_batches is not None:
            limit = "limit_train_batches", limit_train_batches
            steps_per_epoch = _limited(steps_per_epoch, accumulate_grad_batches, *limit)
        limits = [max_steps] if max_steps > 0 else []
        if max_epochs is not None:
            limits.append(max(1, round(max_epochs * steps_per_epoch)))
        require(bool(limits), "max_steps", max_steps, "give max_steps or max_epochs: a run needs an end")
        name, given = ("max_steps", max_steps) if min(limits) == max_steps else ("max_epochs", max_epochs)
        require(min(limits) <= MOST_STEPS, name, given, f"must be at most {MOST_STEPS:,} optimiser steps")
        if isinstance(val_check_interval, int):
            val_every = max(1, val_check_interval // accumulate_grad_batches)
        else:
            val_every = max(1, round(val_check_interval * steps_per_epoch))
        return cls(min(limits), steps_per_epoch, val_every, accumulate_grad_batches, overfits)

    @property
    def total_batches(self) -> int:
        """Batches of the whole run, on each device."""
        return self.total_steps * self.accumulate

    def validates_after(self, step: int) -> bool:
        """Whether validation follows optimiser step number `step` = 1, 2, …"""
        return step % self.val_every == 0 or step == self.total_steps

    def epoch(self, step: int) -> float:
        """How many passes over the training data `step` steps are."""
        return step / self.steps_per_epoch


def _limited(steps: int, accumulate: int, name: str, limit: float) -> int:
    """The optimiser steps of an epoch of so many that are left by a share of it, or a number of its batches."""
    if isinstance(limit, int):
        allowed = f"must be at least {accumulate} batches, which make a step, or a share"
        require(limit >= accumulate, name, limit, allowed)
        return min(steps, limit // accumulate)
    require(0 < limit <= 1, name, limit, "must be a share in (0, 1], or a number of batches")
    require(int(limit * steps) >= 1, name, limit, f"must be at least {1 / steps:.3g}: an epoch has {steps} steps")
    return int(limit * steps)
