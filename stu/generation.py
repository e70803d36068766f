"""Generation: a causal model continues a sequence of tokens, one step at a time.

V vocabulary
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from stu.backbone import BackboneState, SequenceModel
from stu.errors import OptionError, require


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How many tokens are generated, and how each is drawn.

    temperature: of the logits; 0: always the most probable token. top_k: only from the k most probable; top_p: only
    from the most probable that together have this probability. seed: of what is drawn. Raises `OptionError`.
    """

    max_tokens: int = 500
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.max_tokens >= 0, "max_tokens", self.max_tokens, "must be at least 0")
        require(0 <= self.temperature < math.inf, "temperature", self.temperature, "must be at least 0 and finite")
        require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "must be at least 1, or null")
        require(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "must be in (0, 1], or null")
        require(0 <= self.seed < 2**63, "seed", self.seed, "must be at least 0 and below 2^63")


def generate(
    model: SequenceModel,
    tokens: Sequence[int],
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    start: int | None = None,
    alphabet: range | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Continue `tokens` by `max_tokens` more, each yielded when it is drawn.

    The model is causal, in eval mode, and predicts the logits of the next token at every step. It reads the tokens at
    once (`prefill`), then one after the other (`step_`). Where it takes no more steps than `Backbone.limit`, it reads
    the last half of so many again when they are used up, so that each token is predicted from at least that half.

    start: the token that stands before the first one, and before what is read again; without it there must be tokens.
    alphabet: the tokens that may be drawn; None: all. temperature, top_k, top_p: as in `Sampling`. generator: of the
    CPU, where tokens are drawn whatever the model's device.
    """
    require(model.backbone.causal, "model", "bidirectional", "must be causal")
    require(not model.training, "model.training", True, "must be in eval mode: model.eval()")
    require(len(tokens) > 0 or start is not None, "tokens", "[]", "must not be empty, as no token starts a sequence")
    least = 1 if start is None else 2
    limit = model.backbone.limit
    require(limit >= least, "seq_len", limit, f"must be at least {least} to generate")
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    return _generated(model, list(tokens), [] if start is None else [start], sampling, alphabet, generator)


def continued(
    model: SequenceModel, tokens: Sequence[int], sampling: Sampling, *, start: int | None, alphabet: range | None
) -> Iterator[int]:
    """`generate`, as `sampling` says."""
    options = asdict(sampling)
    generator = torch.Generator().manual_seed(options.pop("seed"))
    return generate(model, tokens, **options, start=start, alphabet=alphabet, generator=generator)


def _generated(
    model: SequenceModel,
    tokens: list[int],
    start: list[int],
    sampling: Sampling,
    alphabet: range | None,
    generator: torch.Generator | None,
) -> Iterator[int]:
    left, limit = sampling.max_tokens, model.backbone.limit - len(start)
    while left > 0:
        if len(tokens) > limit:
            tokens = tokens[len(tokens) - max(1, int(limit) // 2) :]
        count = int(min(left, limit - len(tokens) + 1))
        logits, state = _read(model, start + tokens, count)
        for index in range(count):
            drawn = torch.multinomial(probabilities(logits, sampling, alphabet), 1, generator=generator)
            token = int(drawn)
            yield token
            tokens.append(token)
            if index < count - 1:
                logits, state = _step(model, token, state)
        left -= count


def probabilities(logits: Tensor, sampling: Sampling, alphabet: range | None = None) -> Tensor:
    """Those by which the next token is drawn, (V,) → (V,), in float64 on the CPU; no others than of the alphabet.

    Raises `OptionError` where no logit is finite.
    """
    logits = logits.detach().to("cpu", torch.float64, copy=True)
    if alphabet is not None:
        logits[: alphabet.start] = logits[alphabet.stop :] = -math.inf
    best = float(logits.max())
    require(math.isfinite(best), "model", best, "predicts no finite logit; its weights are damaged or have diverged")
    if sampling.temperature == 0:
        return nn.functional.one_hot(logits.argmax(), len(logits)).double()
    if sampling.top_k is not None and sampling.top_k < len(logits):
        logits[logits < logits.topk(sampling.top_k).values[-1]] = -math.inf
    shares = ((logits - best) / sampling.temperature).softmax(0)
    if sampling.top_p is not None:
        ranked, order = shares.sort(descending=True, stable=True)
        shares[order[ranked.cumsum(0) - ranked >= sampling.top_p]] = 0
    return shares / shares.sum()


@torch.no_grad()
def _read(model: SequenceModel, tokens: list[int], steps: int) -> tuple[Tensor, BackboneState]:
    """Logits (V,) after these tokens, and the state after them, with room for `steps` more."""
    inputs = torch.tensor([tokens], device=next(model.parameters()).device)
    try:
        features, state = model.backbone.prefill(model.encoder(inputs))
    except IndexError as error:
        raise OptionError(
            "tokens", f"{min(tokens)} … {max(tokens)}", "must be in the vocabulary of the model"
        ) from error
    return model.head(features[:, -1:], None)[0, -1], model.backbone.reserve(state, steps)


@torch.no_grad()
def _step(model: SequenceModel, token: int, state: BackboneState) -> tuple[Tensor, BackboneState]:
    """Logits (V,) after one more token, and the state after it."""
    inputs = torch.tensor([[token]], device=state.positions.device)
    features, state = model.backbone.step_(model.encoder(inputs).squeeze(1), state)
    return model.head(features.unsqueeze(1), None)[0, -1], state
