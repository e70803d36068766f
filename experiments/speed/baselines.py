r"""State space models as the official codes compute them, beside ours: python -m experiments.speed.baselines.

B batch, L length, D model width, N size of the state, P modes kept, F = L//2 + 1 frequencies, H heads, c chunks of Q
steps

Same parameters, same outputs, another way: the Vandermonde and Cauchy kernels of S4D and S4 whole in memory, then FFTs
over all channels at once (2206.11893, section 3; 2111.00396, section 3); S5 and the LRU by the associative scan of
`jax.lax` over all their states (2208.04933, section 3; 2303.06349, section 3); Mamba-2 by the minimal form of its
recurrence (2405.21060, section 6, listing 1). All of it is plain PyTorch, with the gradients of autograd.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.speed.bench import Data, Settings, synchronize
from experiments.speed.contenders import Size, build, find
from experiments.speed.measure import in_turns
from experiments.speed.results import Timing, commit, describe_machine, now
from stu.mixers.lru import LRU
from stu.mixers.mamba2 import Mamba2
from stu.mixers.s4 import S4
from stu.mixers.s4d import S4D
from stu.mixers.s5 import S5

FILE = "baselines.json"


class LiteralS4D(nn.Module):
    """S4D by a Vandermonde matrix with a row of L powers for every mode of every channel. `layer`: zoh, causal."""

    def __init__(self, layer: S4D) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        layer = self.layer
        dt = layer.log_dt.exp().unsqueeze(-1)  # (D, 1)
        A = torch.complex(-layer.log_A_real.exp(), layer.A_imag).repeat(layer.d_model // len(layer.A_imag), 1)
        B = torch.view_as_complex(layer.B).repeat(layer.d_model // len(layer.B), 1)
        weights = torch.view_as_complex(layer.C[0]) * B * (torch.exp(dt * A) - 1) / A  # (D, P)
        powers = torch.exp((dt * A).unsqueeze(-1) * torch.arange(u.shape[1], device=u.device))  # (D, P, L)
        return fft_convolution(u, 2 * torch.einsum("dp,dpl->dl", weights, powers).real) + layer.D * u


class LiteralS4(nn.Module):
    """S4 by its generating function at the roots of unity: a Cauchy matrix a channel, and Woodbury's correction.

    `layer`: bilinear, causal, of rank 1. The parameter is C̃ = C (1 − Ā^L), as in the official code, which so needs no
    power of Ā: it is made from the layer's C for one length, and what the layer learns later is not followed.
    """

    def __init__(self, layer: S4, length: int) -> None:
        super().__init__()
        self.layer = layer
        with torch.no_grad():
            dt, A, P, _, C = self._modes(torch.view_as_complex(layer.C[0]))
            eye = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
            half_step = dt.unsqueeze(-1) / 2 * (torch.diag_embed(A) - P.unsqueeze(-1) * P.conj().unsqueeze(-2))
            step = torch.linalg.solve(eye - half_step, eye + half_step)  # Ā (D, N, N)
            C = C - (C.unsqueeze(-2) @ torch.linalg.matrix_power(step, length)).squeeze(-2)
        self.C = nn.Parameter(torch.view_as_real(C[:, : layer.A_imag.shape[1]]).clone())

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, D) → (B, L, D), of the one length."""
        length = u.shape[1]
        dt, A, P, B, C = self._modes(torch.view_as_complex(self.C))
        angle = -2 * torch.pi * torch.arange(length // 2 + 1, device=u.device, dtype=u.dtype) / length
        root = torch.polar(torch.ones_like(angle), angle)  # ω (F,)
        # 2/(1 + ω) · 1/(z − dt·A) with z = 2 (1 − ω)/(1 + ω), which at ω = −1 is finite in this form alone
        cauchy = 2 / (2 * (1 - root) - (1 + root) * (dt * A).unsqueeze(-1))  # (D, N, F)
        pairs = torch.stack((B, P))[:, None] * torch.stack((C, P.conj())) * dt  # (2, 2, D, N)
        (by_b, by_b_p), (by_p, by_p_p) = torch.einsum("ijdn,dnf->ijdf", pairs, cauchy)
        back = (1 + root) / 2
        spectrum = by_b - by_b_p * by_p * back / (1 + by_p_p * back)
        return fft_convolution(u, torch.fft.irfft(spectrum, n=length)) + self.layer.D * u

    def _modes(self, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Dt (D, 1), Λ, P, B and C of all modes, conjugates included, (D, N)."""
        layer = self.layer
        copies = layer.d_model // len(layer.A_imag)
        A = torch.complex(-layer.log_A_real.exp(), layer.A_imag)
        halves = [x.repeat(copies, 1) for x in (A, torch.view_as_complex(layer.P[0]), torch.view_as_complex(layer.B))]
        A, P, B, C = (torch.cat((half, half.conj()), -1) for half in (*halves, C))
        return layer.log_dt.exp().unsqueeze(-1), A, P, B, C


class LiteralS5(nn.Module):
    """S5 by an associative scan over its modes. `layer`: zoh, causal, with one mode of each conjugate pair."""

    def __init__(self, layer: S5) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        layer = self.layer
        eigenvalues = torch.view_as_complex(layer.Lambda)
        decay = torch.exp(eigenvalues * layer.log_dt.exp())
        B = ((decay - 1) / eigenvalues).unsqueeze(-1) * torch.view_as_complex(layer.B)
        return 2 * scanned(u, decay, B, torch.view_as_complex(layer.C[0])) + layer.D * u


class LiteralLRU(nn.Module):
    """The LRU by an associative scan over its states. `layer`: exponential, normalised, causal."""

    def __init__(self, layer: LRU) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        layer = self.layer
        assert layer.nu_log is not None
        assert layer.theta_log is not None
        assert layer.gamma_log is not None
        decay = torch.exp(torch.complex(-layer.nu_log.exp(), layer.theta_log.exp()))
        B = layer.gamma_log.exp().unsqueeze(-1) * torch.view_as_complex(layer.B)
        return scanned(u, decay, B, torch.view_as_complex(layer.C[0])) + layer.D * u


class LiteralMamba2(nn.Module):
    """Mamba-2 by the paper's listing. `layer`: causal; L is a multiple of its chunks, or below one."""

    def __init__(self, layer: Mamba2) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        layer, taps = self.layer, self.layer.conv.kernel_size[0]
        inner, heads = layer.widths[0], layer.num_heads
        gate, signals, dt = layer.project_in(u).split((inner, sum(layer.widths), heads), -1)
        dt = F.softplus(dt + layer.dt_bias)  # (B, L, H)
        kernel = layer.conv.weight.squeeze(-1)
        convolved = F.conv1d(signals.mT, kernel, layer.conv.bias, padding=taps - 1, groups=len(kernel))
        x, B, C = F.silu(convolved[:, :, : u.shape[1]].mT).split(layer.widths, -1)
        x = x.unflatten(-1, (heads, -1))  # (B, L, H, width of a head)
        B, C = (
            each.unflatten(-1, (layer.num_groups, -1)).repeat_interleave(heads // layer.num_groups, 2)
            for each in (B, C)
        )  # (B, L, H, N)
        chunk = min(layer.chunk_size, u.shape[1])
        y = minimal_ssd(x * dt.unsqueeze(-1), dt * -layer.A_log.exp(), B, C, chunk) + layer.D.unsqueeze(-1) * x
        gated = (y.flatten(-2) * F.silu(gate)).unflatten(-1, (layer.num_groups, -1))
        normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + 1e-5)
        return layer.project_out(normed.flatten(-2) * layer.gain)


def fft_convolution(u: Tensor, kernel: Tensor) -> Tensor:
    """y_t = Σ_{i≤t} k(i) u_{t−i}, all channels in one FFT of length 2L: (B, L, D), (D, L) → (B, L, D)."""
    n = 2 * u.shape[1]
    product = torch.fft.rfft(u.mT, n=n) * torch.fft.rfft(kernel, n=n)  # (B, D, L + 1)
    return torch.fft.irfft(product, n=n)[..., : u.shape[1]].mT


def scanned(u: Tensor, decay: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Re(C x_t) with x_t = λ ⊙ x_{t−1} + B u_t: u (B, L, D), complex λ (N,), B (N, D), C (D, N) → (B, L, D)."""
    drive = u.to(B.dtype) @ B.T  # (B, L, N)
    _, x = associative_scan(decay.expand(1, u.shape[1], -1), drive)  # jax.vmap does not repeat λ for a batch, either
    return (x @ C.T).real


def associative_scan(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) of all prefixes, where (a₁, b₁), (a₂, b₂) → (a₂ a₁, a₂ b₁ + b₂): (B or 1, L, N), (B, L, N) → the same.

    Neighbours are multiplied; the prefixes of their products, half as many, are those of all odd steps; and those of
    the even steps are one product away.
    """
    length = b.shape[1]
    if length == 1:
        return a, b
    pair_a = a[:, 1::2] * a[:, : length - 1 : 2]
    pair_b = a[:, 1::2] * b[:, : length - 1 : 2] + b[:, 1::2]
    odd_a, odd_b = associative_scan(pair_a, pair_b)
    before_a, before_b = odd_a[:, : (length - 1) // 2], odd_b[:, : (length - 1) // 2]
    even_a = torch.cat((a[:, :1], a[:, 2::2] * before_a), 1)
    even_b = torch.cat((b[:, :1], a[:, 2::2] * before_b + b[:, 2::2]), 1)
    return interleaved(even_a, odd_a), interleaved(even_b, odd_b)


def interleaved(even: Tensor, odd: Tensor) -> Tensor:
    """Steps 0, 2, … and 1, 3, … in their order: (B, ⌈L/2⌉, N), (B, ⌊L/2⌋, N) → (B, L, N)."""
    pairs = torch.stack((even[:, : odd.shape[1]], odd), 2).flatten(1, 2)
    return torch.cat((pairs, even[:, odd.shape[1] :]), 1)


def minimal_ssd(x: Tensor, steps: Tensor, B: Tensor, C: Tensor, chunk: int) -> Tensor:
    """y_t = h_tᵀ C_t with h_t = exp(steps_t) h_{t−1} + B_t x_tᵀ, in chunks of Q steps.

    x: (B, L, H, width); steps: (B, L, H), Δ_t A; B, C: (B, L, H, N). Returns (B, L, H, width).
    """
    x, steps, B, C = (each.unflatten(1, (-1, chunk)) for each in (x, steps, B, C))  # (B, c, Q, …)
    steps = steps.permute(0, 3, 1, 2)  # (B, H, c, Q)
    sums = steps.cumsum(-1)
    inside = torch.einsum("bcthn,bcshn,bhcts,bcshp->bcthp", C, B, segment_sums(steps).exp(), x)
    added = torch.einsum("bcshn,bhcs,bcshp->bchpn", B, (sums[..., -1:] - sums).exp(), x)
    states = torch.cat((torch.zeros_like(added[:, :1]), added), 1)
    between = segment_sums(F.pad(sums[..., -1], (1, 0))).exp()  # (B, H, c + 1, c + 1)
    entering = torch.einsum("bhzc,bchpn->bzhpn", between, states)[:, :-1]
    return (inside + torch.einsum("bcthn,bchpn,bhct->bcthp", C, entering, sums.exp())).flatten(1, 2)


def segment_sums(steps: Tensor) -> Tensor:
    """Σ_{s<r≤t} steps_r of all t and s, −∞ where s > t: (…, Q) → (…, Q, Q)."""
    length = steps.shape[-1]
    lower = torch.ones(length, length, dtype=torch.bool, device=steps.device).tril()
    repeated = steps.unsqueeze(-1).expand(*steps.shape, length).masked_fill(~lower.tril(-1), 0)  # [r, s]
    return repeated.cumsum(-2).masked_fill(~lower, -torch.inf)


LITERAL: Mapping[str, Callable[..., nn.Module]] = {
    "s4": LiteralS4,
    "s4d": LiteralS4D,
    "s5": LiteralS5,
    "lru": LiteralLRU,
    "mamba2": LiteralMamba2,
}


@dataclass(frozen=True)
class Pair:
    """What a model took, and what its literal form did: forward and backward, in seconds."""

    model: str
    length: int
    batch: int
    width: int
    ours: Timing
    literal: Timing

    @property
    def ratio(self) -> float:
        """Ours over literal, by the medians."""
        return self.ours.median / self.literal.median


def literal(model: str, layer: nn.Module, length: int) -> nn.Module:
    """The literal form of a layer of conf/model, with its parameters, for inputs of this length."""
    return LiteralS4(layer, length) if isinstance(layer, S4) else LITERAL[model](layer)


def main(arguments: Sequence[str] | None = None) -> None:
    """Time forward and backward of both forms of each model, in turns, print a table and write what was measured."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m experiments.speed.baselines", description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=LITERAL, default=list(LITERAL), metavar="MODEL")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096], metavar="L")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--min-s", type=float, default=1.0, help="seconds of each call, at least (default: 1)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"where to write {FILE} (default: nowhere)")
    options = parser.parse_args(given)
    settings = Settings(device=options.device, threads=options.threads, min_seconds=options.min_s, repeats=3)
    settings.apply()
    pairs: list[Pair] = []
    for length in options.lengths:
        size = Size(length, options.batch, options.width, None)
        pairs += _compared(options.models, size, settings)
        Console().print(_table(size, pairs[-len(options.models) :]))
    if options.out is not None:
        _write(options.out, f"python -m experiments.speed.baselines {shlex.join(given)}".strip(), settings, pairs)


def _compared(models: Sequence[str], size: Size, settings: Settings) -> list[Pair]:
    """All models and their literal forms in turns. Raises what one of them raises."""
    data, calls = Data.draw(size, settings), {}
    for contender in find(models, causal=True, size=size):
        torch.manual_seed(0)
        layer = build(contender.node(size), size.width).to(settings.device)
        calls[contender.name, "ours"] = partial(_forward_backward, layer, data)
        calls[contender.name, "literal"] = partial(_forward_backward, literal(contender.name, layer, size.length), data)
    timings, failures = in_turns(calls, min_seconds=settings.min_seconds, repeats=settings.repeats)
    for error in failures.values():
        raise error
    return [Pair(model, *size[:3], timings[model, "ours"], timings[model, "literal"]) for model in models]


def _forward_backward(layer: nn.Module, data: Data) -> None:
    """Gradients of the input and of all parameters that are used: the literal S4 has its own C."""
    x = data.x.detach().requires_grad_()
    torch.autograd.grad(layer(x), (x, *layer.parameters()), data.grad, allow_unused=True)
    synchronize(x.device)


def _table(size: Size, pairs: Sequence[Pair]) -> Table:
    title = f"L = {size.length}, B = {size.batch}, D = {size.width}, forward and backward: medians (minima)"
    table = Table(title=title, title_justify="left")
    for column in ("", "ours", "literal", "ours / literal"):
        table.add_column(column, justify="left" if not column else "right")
    for pair in pairs:
        times = (f"{1e3 * timing.median:.0f} ({1e3 * timing.min:.0f}) ms" for timing in (pair.ours, pair.literal))
        table.add_row(pair.model, *times, f"{pair.ratio:.2f} ({pair.ours.min / pair.literal.min:.2f})")
    return table


def _write(folder: Path, command: str, settings: Settings, pairs: Sequence[Pair]) -> None:
    """All that was measured, and on what machine."""
    content = {
        "command": command,
        "date": now(),
        "commit": commit(),
        "machine": describe_machine(settings),
        "settings": asdict(settings),
        "rows": [asdict(pair) | {"ratio": pair.ratio} for pair in pairs],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
