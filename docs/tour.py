# %% [markdown]
# # A tour in a minute
#
# For people who only want `from stu import STU`: PyTorch is all it needs. `python docs/tour.py` runs it, as does any
# editor that knows `# %%` cells; `docs/tour.ipynb` is the same as a notebook.

# %%
import math
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stu import STU, Backbone, SequenceModel, spectral_filters
from stu.channel import GLU
from stu.encoders import LinearEncoder
from stu.heads import PooledHead
from stu.mixers import S4D

torch.manual_seed(0)
torch.set_num_threads(1)  # layers as small as these run fastest so
L, K = 128, 24  # length of a sequence, number of filters

# %% [markdown]
# ## Filters
#
# Spectral filters are the leading eigenvectors of a Hankel matrix: fixed impulse responses of which every slowly
# decaying exponential is a mixture. Their eigenvalues fall exponentially, so that few suffice.

# %%
eigenvalues, filters = spectral_filters(seq_len=L, num_filters=K)  # (K,) and (L, K), float64
for k in (1, 4, 8, 16, 24):
    print(f"σ_{k} / σ_1 = {eigenvalues[k - 1] / eigenvalues[0]:.1e}")
assert torch.allclose(filters.T @ filters, torch.eye(K, dtype=torch.float64), atol=1e-13)

response = 0.999 ** torch.arange(L, dtype=torch.float64)  # a mode that remembers for a thousand steps
for count in (4, 8, 16, 24):
    rest = response - filters[:, :count] @ (filters[:, :count].T @ response)
    print(f"0.999^i by {count:2} filters: relative error {rest.norm() / response.norm():.1e}")
assert rest.norm() < 1e-5 * response.norm()

# %% [markdown]
# ## A layer
#
# A mixer maps (B, L, D) to (B, L, D). All mixers have the same contract, so that one can replace another: `STU`,
# `STUT`, `S4`, `S4D`, `S5`, `LRU`, `Mamba2`, `RNN`, `Attention`.

# %%
layer = STU(d_model=16, seq_len=L, num_filters=K)
x = torch.randn(2, L, 16)  # (B, L, D)
y = layer(x)
print(f"{tuple(x.shape)} → {tuple(y.shape)}, {sum(p.numel() for p in layer.parameters()):,} parameters")

later = x.clone()
later[:, 60:] += 1  # a causal layer does not look ahead
assert torch.allclose(layer(later)[:, :60], y[:, :60], atol=1e-5)

# %% [markdown]
# ## Learning a system of long memory
#
# The outputs of a linear dynamical system with eigenvalues ±0.9999, from its inputs: the synthetic experiment of the
# STU paper. An STU and an S4D of about as many parameters see the same sequences, one per step. Errors are mean squares
# in units of the outputs' variance.


# %%
def system(batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """x_t = A x_{t−1} + B u_t, y_t = C x_t + D u_t: inputs u (batch, L, 3), outputs y (batch, L, 3)."""
    matrices = torch.Generator().manual_seed(1)
    A = 0.9999 * torch.tensor([1.0, -1.0, 1.0, -1.0])
    B, C = (torch.randn(shape, generator=matrices) for shape in ((3, 4), (4, 3)))
    D = torch.randn(3, generator=matrices)
    u = torch.randn(batch, L, 3, generator=torch.Generator().manual_seed(seed))
    state, outputs = torch.zeros(batch, 4), []
    for u_t in u.unbind(1):
        state = A * state + u_t @ B
        outputs.append(state @ C + D * u_t)
    return u, torch.stack(outputs, 1)


train, test = system(batch=200, seed=2), system(batch=20, seed=3)
scale = train[1].std()


def fit(model: nn.Module, lr: float) -> float:
    """Train on every sequence once; the error on new ones."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for u, y in zip(*train, strict=True):
        optimizer.zero_grad()
        F.mse_loss(model(u[None]), y[None] / scale).backward()
        optimizer.step()
    with torch.no_grad():
        return F.mse_loss(model(test[0]), test[1] / scale).item()


stu = STU(3, seq_len=L, num_filters=25)
s4d = nn.Sequential(nn.Linear(3, 10, bias=False), S4D(10, d_state=32), nn.Linear(10, 3, bias=False))
errors = {}
for name, model, lr in (("STU", stu, 0.3), ("S4D", s4d, 0.01)):  # good rates for each
    started = time.perf_counter()
    errors[name] = fit(model, lr)
    size = sum(p.numel() for p in model.parameters())
    print(f"{name}: {size} parameters, error {errors[name]:.1e}, {time.perf_counter() - started:.1f} s")
assert errors["STU"] < 0.01
assert errors["STU"] < errors["S4D"] / 10

# %% [markdown]
# ## Streaming
#
# Step by step, for generation or control: the same outputs, from a state of fixed size. `prefill` is a `forward` that
# also returns the state, so that a sequence can be cut anywhere.

# %%
stu.eval()
u = test[0][:1]  # (1, L, 3)
with torch.no_grad():
    whole = stu(u)
    head, state = stu.prefill(u[:, : L // 2])
    pieces = [head]
    for u_t in u[:, L // 2 :].unbind(1):
        y_t, state = stu.step(u_t, state)
        pieces.append(y_t.unsqueeze(1))
difference = (torch.cat(pieces, 1) - whole).abs().max().item()
print(f"step by step and at once differ by {difference:.0e}")
assert difference < 1e-4

# %% [markdown]
# ## A model
#
# A `Backbone` stacks residual blocks of any mixers; an encoder stands before it and a head after it. A toy task: how
# many periods, two to five, has a sine of random phase in noise that is stronger than itself?


# %%
def waves(batch: int) -> tuple[Tensor, Tensor]:
    """Noisy sines (batch, L, 1), and their classes (batch,)."""
    classes = torch.randint(4, (batch,))
    angle = 2 * math.pi * ((2 + classes[:, None]) * torch.arange(L) / L + torch.rand(batch, 1))
    return (angle.sin() + torch.randn(batch, L)).unsqueeze(-1), classes


model = SequenceModel(
    LinearEncoder(16, d_input=1),
    Backbone(16, depth=2, mixer=lambda d: STU(d, seq_len=L, num_filters=16), channel_mixer=GLU, norm="layer"),
    PooledHead(16, d_output=4),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(1, 101):
    inputs, targets = waves(32)
    loss = F.cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 25 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

model.eval()
with torch.no_grad():
    inputs, targets = waves(500)
    accuracy = (model(inputs).argmax(-1) == targets).float().mean().item()
print(f"accuracy {accuracy:.0%}; a guess has 25%")
assert accuracy > 0.85

# %% [markdown]
# ## Where to go next
#
# - `python train.py model=stu task=lra_listops` trains on real tasks, with configuration, checkpoints and logs:
#   [models](models.md), [tasks](tasks.md).
# - [The mathematics](mathematics.md): why few filters suffice, and how they are computed.
# - The interfaces: [`stu`](api/stu.md), [mixers](api/mixers.md), [operations](api/ops.md).
