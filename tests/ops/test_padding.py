"""Real positions moved to either end and back."""

import torch

from stu.ops.padding import at_end, at_front, longest, put_back

MASK = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]]).bool()
X = torch.arange(1.0, 17).view(4, 4, 1).masked_fill(~MASK.unsqueeze(-1), torch.nan)


def rows(x):
    return x.squeeze(-1).int().tolist()


def test_real_positions_first_and_back():
    front = at_front(X, MASK)
    assert rows(front) == [[2, 3, 0, 0], [5, 6, 7, 8], [0, 0, 0, 0], [16, 0, 0, 0]]
    assert torch.equal(put_back(front, MASK)[MASK], X[MASK])


def test_real_positions_last_after_what_came_before():
    assert rows(at_end(X, MASK)) == [[0, 0, 2, 3], [5, 6, 7, 8], [0, 0, 0, 0], [0, 0, 0, 16]]
    before = -torch.arange(1.0, 5).view(4, 1, 1)
    assert rows(at_end(X, MASK, before)) == [[0, 0, -1, 2, 3], [-2, 5, 6, 7, 8], [0, 0, 0, 0, -3], [0, 0, 0, -4, 16]]
    assert torch.equal(at_end(before, None, before), torch.cat((before, before), 1))


def test_without_a_mask_all_is_real():
    assert all(function(X, None) is X for function in (at_front, at_end, put_back))
    assert (longest(X, None), longest(X, MASK), longest(X[:0], MASK[:0])) == (4, 4, 0)
    assert longest(X, MASK & False) == 0
