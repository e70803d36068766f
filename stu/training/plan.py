"""How long a run is and when it validates, counted in optimiser steps."""

from dataclasses import dataclass
from typing import Any, ClassVar

from stu.errors import require


@dataclass(frozen=True)
class StepPlan:
    """The whole run is one pass over `total_steps` · `accumulate` batches.

    Lightning's epoch is not used: what it counts as one epoch is the run, so that a run can stop and go on at any
    step. An epoch here is `steps_per_epoch` optimiser steps, one pass over the training data.
    """

    # What a Trainer is told instead: one pass over all batches, validated when `Checkpoints` says so, and divided over
    # devices by the data module.
    trainer_arguments: ClassVar[dict[str, Any]] = {
        "max_epochs": 1,
        "max_steps": -1,
        "val_check_interval": 1.0,
        "use_distributed_sampler": False,
        "enable_model_summary": False,
    }

    total_steps: int
    steps_per_epoch: int
    val_every: int
    accumulate: int

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
    ) -> "StepPlan":
        """Translate Lightning's arguments, with their meaning, into steps.

        The shorter of `max_epochs` and `max_steps` (−1 for no limit) counts. `val_check_interval` is a share of an
        epoch if a float, a number of batches if an integer.
        """
        require(1 <= batch_size <= examples, "batch_size", batch_size, f"must be in 1 … {examples} training examples")
        require(accumulate_grad_batches >= 1, "accumulate_grad_batches", accumulate_grad_batches, "must be at least 1")
        require(max_epochs is None or max_epochs > 0, "max_epochs", max_epochs, "must be above 0, or null for no limit")
        require(max_steps >= 1 or max_steps == -1, "max_steps", max_steps, "must be at least 1, or -1 for no limit")
        require(val_check_interval > 0, "val_check_interval", val_check_interval, "must be above 0")
        steps_per_epoch = examples // batch_size
        limits = [max_steps] if max_steps > 0 else []
        if max_epochs is not None:
            limits.append(max(1, round(max_epochs * steps_per_epoch)))
        require(bool(limits), "max_steps", max_steps, "give max_steps or max_epochs: a run needs an end")
        if isinstance(val_check_interval, int):
            val_every = max(1, val_check_interval // accumulate_grad_batches)
        else:
            val_every = max(1, round(val_check_interval * steps_per_epoch))
        return cls(min(limits), steps_per_epoch, val_every, accumulate_grad_batches)

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
