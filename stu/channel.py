"""Position-wise mixers of channels, (…, D) → (…, D).

D model width
"""

from torch import Tensor, nn
from torch.nn import functional as F

from stu.errors import require


class GLU(nn.Module):
    """GELU → dropout → linear to 2D → gated linear unit: what follows the mixer in S4 and STU blocks.

    Sources: Dauphin et al., 1612.08083; block of S4 (2111.00396) and of the STU (2312.06837, section 4), whose
    official code uses the tanh form of GELU.
    """

    def __init__(self, d_model: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(d_model, 2 * d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) → (…, D)."""
        return F.glu(self.linear(self.dropout(F.gelu(x, approximate="tanh"))), dim=-1)


class MLP(nn.Module):
    """Linear to `expand`·D → GELU → dropout → linear back: the feed-forward layer of a Transformer (1706.03762)."""

    def __init__(self, d_model: int, *, expand: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        require(expand > 0, "expand", expand, "must be above 0")
        hidden = max(1, round(expand * d_model))
        self.up, self.down = nn.Linear(d_model, hidden), nn.Linear(hidden, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) → (…, D)."""
        return self.down(self.dropout(F.gelu(self.up(x))))
