"""Generation: the tokens that recomputing all of the context gives, drawn as they should be, for every causal model."""

import math
from itertools import islice

import pytest
import torch
from torch.testing import assert_close

from stu.backbone import Backbone, SequenceModel
from stu.encoders import TokenEncoder
from stu.errors import OptionError
from stu.generation import Sampling, generate, probabilities
from stu.heads import StepHead
from stu.mixers.attention import Attention
from tests.models import MODELS, small_backbone

V, SEQ_LEN = 11, 16
PROMPT = [3, 1, 4, 1, 5]


def model(name: str, **options) -> SequenceModel:
    torch.manual_seed(0)
    backbone = small_backbone(name, seq_len=SEQ_LEN, **options)
    return SequenceModel(TokenEncoder(8, vocab_size=V), backbone, StepHead(8, d_output=V)).double().eval()


def recomputed(model: SequenceModel, tokens: list[int], count: int, limit: float, start: list[int]) -> list[int]:
    """The most probable tokens, from the whole context each time, cut to its last half where it is too long."""
    window = list(tokens)
    for _ in range(count):
        if len(start) + len(window) > limit:
            window = window[-max(1, int(limit - len(start)) // 2) :]
        logits = model(torch.tensor([start + window]))[0, -1]
        window.append(int(logits.argmax()))
        tokens = [*tokens, window[-1]]
    return tokens[-count:]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("start", [None, 0], ids=["", "with a start"])
def test_greedy_tokens_are_those_of_recomputing_the_context(name: str, start: int | None):
    causal = model(name)
    given = [] if start is None else [start]
    for prompt, count in ((PROMPT, 40), (PROMPT * 5, 3)):  # past the limit of a model, where it has one
        found = list(generate(causal, prompt, count, temperature=0, start=start))
        with torch.no_grad():
            assert found == recomputed(causal, prompt, count, causal.backbone.limit, given)


def test_limits_are_those_of_mixers_and_positions():
    limits = {name: model(name).backbone.limit for name in MODELS}
    assert {limits[name] for name in ("stu", "stu_ar", "stu_t")} == {SEQ_LEN}
    assert limits["transformer"] == limits["s5"] == math.inf
    assert model("transformer", positions="learned").backbone.limit == SEQ_LEN


def test_learned_positions_go_on_past_their_length():
    learned = model("transformer", positions="learned")
    found = list(generate(learned, PROMPT, 30, temperature=0))
    with torch.no_grad():
        assert found == recomputed(learned, PROMPT, 30, SEQ_LEN, [])


def test_tokens_come_one_by_one_and_leave_gradients_alone():
    stream = generate(model("stu"), PROMPT, 10**9)
    for _ in islice(stream, 3):
        assert torch.is_grad_enabled()


def test_the_same_seed_gives_the_same_tokens():
    causal = model("s5")

    def drawn(seed: int) -> list[int]:
        return list(generate(causal, PROMPT, 20, generator=torch.Generator().manual_seed(seed)))

    assert drawn(0) == drawn(0) != drawn(1)


@pytest.mark.parametrize(
    ("options", "alphabet", "tokens"),
    [
        ({}, None, [0, 1, 2, 3, 4]),
        ({"temperature": 3.0}, None, [0, 1, 2, 3, 4]),
        ({"top_k": 3}, None, [0, 2, 4]),
        ({"top_k": 100}, None, [0, 1, 2, 3, 4]),
        ({"top_p": 0.85, "temperature": 0.9}, None, [0, 2, 4]),
        ({"top_p": 1e-9}, None, [0]),
        ({"top_p": 1.0}, None, [0, 1, 2, 3, 4]),
        ({}, range(1, 4), [1, 2, 3]),
        ({"top_k": 1}, range(1, 4), [2]),
        ({"temperature": 0.0}, range(1, 4), [2]),
        ({"temperature": 1e-9, "top_k": 1}, range(1, 9), [4]),
    ],
    ids=str,
)
def test_tokens_are_drawn_by_these_probabilities(options: dict, alphabet: range | None, tokens: list[int]):
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 2.0])
    kept = torch.full((5,), -math.inf, dtype=torch.float64)
    kept[tokens] = logits[tokens].double() / (options.get("temperature", 1.0) or 1.0)
    for given in (logits, logits.bfloat16()):
        assert_close(probabilities(given, Sampling(**options), alphabet), kept.softmax(0))
    assert logits.tolist() == [2.0, 0.0, 1.0, -1.0, 2.0]


def test_tokens_are_drawn_from_the_model():
    causal, generator = model("stu"), torch.Generator().manual_seed(1)
    window: list[int] = []
    with torch.no_grad():
        for _ in range(SEQ_LEN - len(PROMPT)):
            shares = causal(torch.tensor([PROMPT + window]))[0, -1].softmax(0)
            window.append(int(torch.multinomial(shares, 1, generator=generator)))
    assert list(generate(causal, PROMPT, len(window), generator=torch.Generator().manual_seed(1))) == window


def test_what_cannot_be_generated_is_refused():
    causal, bidirectional = model("stu"), model("s4d", causal=False)
    wrong = (
        (lambda: generate(bidirectional, PROMPT, 1), "model=bidirectional: must be causal"),
        (lambda: generate(causal, [], 1), r"tokens=\[\]: must not be empty"),
        (lambda: generate(causal.train(), PROMPT, 1), r"model.training=True: must be in eval mode"),
        (lambda: generate(causal.eval(), PROMPT, -1), "max_tokens=-1: must be at least 0"),
        (lambda: generate(causal, PROMPT, 1, temperature=-0.1), "temperature=-0.1: must be at least 0"),
        (lambda: generate(causal, PROMPT, 1, temperature=math.nan), "temperature=nan"),
        (lambda: generate(causal, PROMPT, 1, top_k=0), "top_k=0: must be at least 1"),
        (lambda: generate(causal, PROMPT, 1, top_p=0.0), r"top_p=0.0: must be in \(0, 1\]"),
        (lambda: list(generate(causal, [V], 1)), "tokens=11 … 11: must be in the vocabulary of the model"),
        (lambda: probabilities(torch.tensor([math.nan, 1.0]), Sampling()), "model=nan: predicts no finite logit"),
    )
    for call, line in wrong:
        with pytest.raises(OptionError, match=line):
            call()
    short = Backbone(8, depth=1, mixer=Attention, channel_mixer=None, positions="learned", seq_len=1)
    one = SequenceModel(TokenEncoder(8, vocab_size=V), short, StepHead(8, d_output=V)).eval()
    with pytest.raises(OptionError, match="seq_len=1: must be at least 2"):
        generate(one, [], 3, start=0)
    assert len(list(generate(one, [1], 5))) == 5
    assert list(generate(causal, PROMPT, 0)) == []
