"""One mixer at one size, and the three things it is timed at: forward, forward and backward, one streamed step.

B batch, L length, D model width
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from experiments.speed.candidates import Size, build
from stu.errors import OptionError, require
from stu.mixer import Mixer

Stage = Literal["build", "forward", "step", "forward_backward", "launches"]

STREAMED = 32  # the last steps of the sequence, one of which is a measurement


@dataclass(frozen=True)
class Settings:
    """How everything is measured; times in seconds, memory in bytes."""

    device: str = "cpu"
    dtype: str = "float32"
    autocast: str | None = None
    tf32: bool = False
    compile: bool = False
    causal: bool = True
    threads: int = 1
    repeats: int = 5
    min_seconds: float = 0.5
    limit_seconds: float = 30.0
    limit_bytes: float = 8e9

    def apply(self) -> None:
        """Set the options that PyTorch has for the whole process."""
        torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = self.tf32
        if self.compile:
            warnings.simplefilter("ignore")  # the compiler warns of what it does not compile


class Data(NamedTuple):
    """An input and the gradient of its output, both (B, L, D)."""

    x: Tensor
    grad: Tensor

    @classmethod
    def draw(cls, size: Size, settings: Settings) -> "Data":
        """Noise, the same for every mixer."""
        torch.manual_seed(0)
        shape, dtype = (2, size.batch, size.length, size.width), getattr(torch, settings.dtype)
        return cls(*torch.randn(shape, dtype=dtype, device=settings.device))


class Bench:
    """A mixer with data; `call(stage)` is what is timed."""

    def __init__(self, node: Mapping[str, Any], data: Data, settings: Settings) -> None:
        torch.manual_seed(0)
        self.data, self.device = data, data.x.device
        self.mixer = without_zeros(build(node, data.x.shape[2])).to(data.x.dtype).to(self.device)
        self.streams = isinstance(self.mixer, Mixer) and self.mixer.causal
        self._autocast = getattr(torch, settings.autocast) if settings.autocast else None
        self._run: Callable[[Tensor], Tensor] = torch.compile(self.mixer) if settings.compile else self.mixer
        self._steps: Iterator[None] | None = None

    def call(self, stage: Stage) -> Callable[[], None]:
        """The call that one measurement of this stage times; it returns when the device is done."""
        return {"forward": self._forward, "forward_backward": self._forward_backward, "step": self._step}[stage]

    def warm_up(self) -> None:
        """Run a few steps of one sequence, so that libraries and threads exist before memory is measured."""
        whole = self._run, self.data
        self._run, self.data = self.mixer, Data(self.data.x[:1, :8], self.data.grad[:1, :8])
        self._forward()
        self._forward_backward()
        self._run, self.data = whole

    def _forward(self) -> None:
        self.mixer.eval()
        with torch.no_grad(), self._precision():
            self._run(self.data.x)
        synchronize(self.device)

    def _forward_backward(self) -> None:
        """Forward, then gradients of the input and of all parameters, as in the middle of a stack."""
        self.mixer.train()
        x = self.data.x.detach().requires_grad_()
        with self._precision():
            y = self._run(x)
        learned = [parameter for parameter in self.mixer.parameters() if parameter.requires_grad]
        torch.autograd.grad(y, (x, *learned), self.data.grad.to(y.dtype), allow_unused=True)
        synchronize(self.device)

    def _step(self) -> None:
        """One of the last steps of the sequence, for the whole batch."""
        if self._steps is None:
            self._steps = self._stream()
        next(self._steps)
        synchronize(self.device)

    def _stream(self) -> Iterator[None]:
        """Continue from the prefix, step by step; at the end of the sequence start over from the prefix."""
        assert isinstance(self.mixer, Mixer)
        self.mixer.eval()
        x, length = self.data.x, self.data.x.shape[1]
        start = length - min(STREAMED, (length + 1) // 2)
        with torch.no_grad(), self._precision():
            first = self.mixer.prefill(x[:, :start])[1] if start else self.mixer.initial_state(len(x))
        while True:
            state = first
            for t in range(start, length):
                with torch.no_grad(), self._precision():
                    _, state = self.mixer.step(x[:, t], state)
                yield

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self._autocast)


def device_of(name: str) -> torch.device:
    """The device of this name, checked to work; a CUDA device with its number. Raises `OptionError`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    require(device.type in ("cpu", "cuda", "mps"), "--device", name, "must be auto, cpu, cuda, cuda:1 … or mps")
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise OptionError("--device", name, f"cannot be used: {str(error).splitlines()[0]}") from error


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def without_zeros(mixer: nn.Module) -> nn.Module:
    """Replace zero parameters by small noise: products of zeros take a device less power and time."""
    with torch.no_grad():
        for parameter in mixer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1 * parameter.numel() ** -0.25)
    return mixer
