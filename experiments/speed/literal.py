"""The layers of `stu.mixers` computed by `stu.reference`, the papers' own algorithms, with the layers' parameters.

Same parameters, same outputs, another way: the STU with every channel convolved with every filter; the Vandermonde and
Cauchy kernels of S4D and S4 whole in memory, then FFTs over all channels at once; S5, the LRU and LinOSS by the
associative scan of `jax.lax` over all their states; Mamba-2 by the minimal form of its recurrence; the gated DeltaNet
and Mega's moving averages one step after the other, and Mega's attention by whole matrices.

B batch, L length, D model width
"""

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from stu.mixer import Mixer
from stu.mixers.gated_deltanet import GatedDeltaNet
from stu.mixers.linoss import LinOSS
from stu.mixers.lru import LRU
from stu.mixers.mamba2 import Mamba2
from stu.mixers.mega import Mega
from stu.mixers.relative_bias import SimpleBias
from stu.mixers.s4 import S4
from stu.mixers.s4d import S4D
from stu.mixers.s5 import S5
from stu.mixers.stu import STU
from stu.ops.filters import spectral_filters
from stu.reference.gated_deltanet import gated_deltanet
from stu.reference.linoss import implicit, linoss
from stu.reference.lru import lru
from stu.reference.mamba2 import mamba2
from stu.reference.mega import mega, rotary_bias, simple_bias
from stu.reference.s4 import s4, truncated_output
from stu.reference.s4d import s4d
from stu.reference.s5 import s5
from stu.reference.stu import fixed_recurrence, stu

M = TypeVar("M", bound=Mixer)


class Literal(nn.Module, Generic[M]):
    """The literal form of a layer, with its parameters, for inputs of `length` steps, on which only S4's depends."""

    def __init__(self, layer: M, length: int) -> None:
        super().__init__()
        self.layer, self.causal = layer, layer.causal


class LiteralSTU(Literal[STU]):
    """The STU: B·L·2K·D numbers of memory, and a loop over time where there is an output recurrence."""

    filters: Tensor

    def __init__(self, layer: STU, length: int) -> None:
        super().__init__(layer, length)
        assert layer.bank.spectral is not None
        self.spectral = layer.bank.spectral
        eigenvalues, filters = spectral_filters(self.spectral.seq_len, self.spectral.num_filters, self.spectral.hankel)
        self.register_buffer("filters", eigenvalues**0.25 * filters, persistent=False)  # (L, K), σ_k^{1/4} φ_k

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        y, reverse = self._from_start(self.layer, u), self.layer.reverse
        return y if reverse is None else y + self._from_start(reverse, u.flip(1)).flip(1)

    def _from_start(self, layer: STU, u: Tensor) -> Tensor:
        lag = self.spectral.recurrence
        m_y = fixed_recurrence(lag, u) if lag else layer.m_y
        return stu(u, self.filters, layer.m_phi, layer.m_u, m_y, delay=self.spectral.delay)


class LiteralS4D(Literal[S4D]):
    """S4D by a Vandermonde matrix with a row of L powers for every mode of every channel. `layer`: zoh, causal."""

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        layer = self.layer
        A = torch.complex(-layer.log_A_real.exp(), layer.A_imag)
        B, C = torch.view_as_complex(layer.B), torch.view_as_complex(layer.C[0])
        return s4d(u, for_channels(A, C), for_channels(B, C), C, layer.D, layer.log_dt.exp())


class LiteralS4(Literal[S4]):
    """S4 by its generating function at the roots of unity. `layer`: bilinear, causal, of rank 1.

    The parameter is C̃, as in the official code: it is made from the layer's C for one length, and does not follow what
    the layer learns later.
    """

    def __init__(self, layer: S4, length: int) -> None:
        super().__init__(layer, length)
        with torch.no_grad():
            A, P, _ = self._modes()
            C_tilde = truncated_output(A, P, torch.view_as_complex(layer.C[0]), layer.log_dt.exp(), length)
        self.C = nn.Parameter(torch.view_as_real(C_tilde).clone())

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, D) → (B, L, D), of the one length."""
        return s4(u, *self._modes(), torch.view_as_complex(self.C), self.layer.D, self.layer.log_dt.exp())

    def _modes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Λ, P and B of every channel, complex (D, N/2)."""
        layer, C = self.layer, self.layer.C[0]
        A = torch.complex(-layer.log_A_real.exp(), layer.A_imag)
        P, B = torch.view_as_complex(layer.P[0]), torch.view_as_complex(layer.B)
        return for_channels(A, C), for_channels(P, C), for_channels(B, C)


class LiteralS5(Literal[S5]):
    """S5 by an associative scan over its modes. `layer`: zoh, causal, with one mode of each conjugate pair."""

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        layer = self.layer
        Lambda, B, C = (torch.view_as_complex(pairs) for pairs in (layer.Lambda, layer.B, layer.C[0]))
        return s5(u, Lambda, B, C, layer.D, layer.log_dt.exp())


class LiteralLRU(Literal[LRU]):
    """The LRU by an associative scan over its states. `layer`: exponential, normalised, causal."""

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        layer = self.layer
        assert layer.nu_log is not None
        assert layer.theta_log is not None
        assert layer.gamma_log is not None
        B, C = torch.view_as_complex(layer.B), torch.view_as_complex(layer.C[0])
        return lru(u, layer.nu_log, layer.theta_log, layer.gamma_log, B, C, layer.D)


class LiteralLinOSS(Literal[LinOSS]):
    """LinOSS by an associative scan over matrices (2, 2). `layer`: im, causal."""

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        layer = self.layer
        B, C = torch.view_as_complex(layer.B), torch.view_as_complex(layer.C[0])
        return linoss(u, implicit(layer.A.relu(), layer.logit_dt.sigmoid()), B, C, layer.D)


class LiteralMamba2(Literal[Mamba2]):
    """Mamba-2 by the paper's listing. `layer`: causal; L is a multiple of its chunks, or below one."""

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        layer = self.layer
        assert layer.conv.bias is not None
        W_in, W_out = layer.project_in.weight, layer.project_out.weight
        convolution = layer.conv.weight[:, 0, :, 0], layer.conv.bias
        system = layer.dt_bias, -layer.A_log.exp(), layer.D, layer.gain
        chunk_size = min(layer.chunk_size, u.shape[1])
        return mamba2(u, W_in, *convolution, *system, W_out, num_groups=layer.num_groups, chunk_size=chunk_size)


class LiteralGatedDeltaNet(Literal[GatedDeltaNet]):
    """The gated DeltaNet by a loop over time. `layer`: causal."""

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        layer = self.layer
        W_in, W_out = layer.project_in.weight, layer.project_out.weight
        system = layer.conv.weight[:, 0, :, 0], layer.dt_bias, layer.A_log, layer.gain
        return gated_deltanet(u, W_in, *system, W_out, largest_beta=2.0 if layer.allow_negative_eigenvalues else 1.0)


class LiteralMega(Literal[Mega]):
    """Mega by a loop over time and matrices of attention, less its residual; L is a multiple of its chunks."""

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        layer, length = self.layer, self.layer.chunk_size or u.shape[1]
        steps = min(length, u.shape[1])
        averages = list(zip(layer.alpha.sigmoid(), layer.delta.sigmoid(), layer.beta, layer.eta, strict=True))
        linear = layer.project_value, layer.project_average, layer.project_out
        W_v, W_average, U_h = ((each.weight, each.bias) for each in linear)
        if layer.bias is None:
            bias = u.new_zeros(length, length)
        elif isinstance(layer.bias, SimpleBias):
            bias = simple_bias(layer.bias.weight, length, causal=layer.causal)
        else:
            bias = rotary_bias(layer.bias.alpha, layer.bias.beta, length)
        bias, scales = bias[:steps, :steps], (layer.kappa, layer.mu)
        options: dict[str, Any] = {"attention": layer.attention, "chunk_size": length}
        return mega(u, averages, layer.omega, W_v, W_average, *scales, U_h, bias, **options) - u


def for_channels(modes: Tensor, C: Tensor) -> Tensor:
    """The systems of all channels, which share `n_ssm` of them in turn: (n_ssm, N/2), C (D, …) → (D, N/2)."""
    return modes.repeat(len(C) // len(modes), 1)


def literal_stu(d_model: int, layer: Callable[[int], STU]) -> LiteralSTU:
    """The literal form of the STU that `layer` makes; a constructor for configurations."""
    mixer = layer(d_model)
    return LiteralSTU(mixer, mixer.seq_len)


LITERAL: Mapping[str, Callable[[Any, int], nn.Module]] = {
    "s4": LiteralS4,
    "s4d": LiteralS4D,
    "s5": LiteralS5,
    "lru": LiteralLRU,
    "linoss": LiteralLinOSS,
    "mamba2": LiteralMamba2,
    "gated_deltanet": LiteralGatedDeltaNet,
    "mega": LiteralMega,
}
