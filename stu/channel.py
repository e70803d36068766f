"""Position-wise mixers of channels, (…, D) → (…, D).

D model width
"""

import math
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from stu.errors import require
from stu.structure import Structured

Gelu = Literal["tanh", "exact"]


class GLU(Structured):
    """GELU → dropout → linear to 2D → gated linear unit: what follows the mixer in S4 and STU blocks.

    gelu: the exact function, as in S4, or its tanh form, as in the STU. Sources: Dauphin et al., 1612.08083; the blocks
    of S4 (2111.00396) and of the STU (2312.06837, section 4) and their official codes.
    """

    structure = ("approximate",)

    def __init__(self, d_model: int, *, dropout: float = 0.0, gelu: Gelu = "tanh") -> None:
        super().__init__()
        require(gelu in ("tanh", "exact"), "gelu", gelu, "must be tanh or exact")
        _require_share(dropout)
        self.approximate = "tanh" if gelu == "tanh" else "none"
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(d_model, 2 * d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) → (…, D)."""
        return F.glu(self.linear(self.dropout(F.gelu(x, approximate=self.approximate))), dim=-1)


class HalfGLU(Structured):
    """z · sigmoid(W z) of z = dropout(GELU(x)): what follows the mixer in S5 blocks (2208.04933).

    gated: "activated", the z above, or "input", x · sigmoid(W z); the official code calls them half_glu1 and half_glu2.
    """

    structure = ("gated",)

    def __init__(
        self, d_model: int, *, dropout: float = 0.0, gated: Literal["activated", "input"] = "activated"
    ) -> None:
        super().__init__()
        require(gated in ("activated", "input"), "gated", gated, "must be activated or input")
        _require_share(dropout)
        self.gated = gated
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) → (…, D)."""
        z = self.dropout(F.gelu(x, approximate="tanh"))
        return (z if self.gated == "activated" else x) * self.linear(z).sigmoid()


class MLP(nn.Module):
    """Linear to `expand`·D → GELU → dropout → linear back: the feed-forward layer of a Transformer (1706.03762)."""

    def __init__(self, d_model: int, *, expand: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        require(0 < expand < math.inf, "expand", expand, "must be above 0 and finite")
        _require_share(dropout)
        hidden = max(1, round(expand * d_model))
        self.up, self.down = nn.Linear(d_model, hidden), nn.Linear(hidden, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) → (…, D)."""
        return self.down(self.dropout(F.gelu(self.up(x))))


def _require_share(dropout: float) -> None:
    require(0 <= dropout < 1, "dropout", dropout, "must be in [0, 1)")
