"""A backward that computes all rows, behind a forward that left some out."""

from __future__ import annotations

import pytest
import torch

from lce_inductor.lower import head as heads
from lce_inductor.spec.statistics import HeadArgs, RowGrads


@pytest.mark.parametrize("name", [f"g_{n}" for n in ("lse", "target", "sum", "neg_entropy")])
def test_a_backward_that_leaves_no_row_out_reads_none_that_the_forward_left_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their lse is zero, below which exp(200) overflows; and nothing comes in for them."""
    monkeypatch.setattr(heads, "counting", lambda *args: None)
    x, w, y = torch.full((4, 2), 10.0), torch.full((3, 2), 10.0) + torch.eye(3, 2), torch.tensor([0, 1, 2, 0])
    x[:2] = torch.tensor([[0.5, -0.25], [0.125, 1.0]])
    g = torch.tensor([1.0, -2.0, 0.0, 0.0])
    z = x @ w.t()
    lse, p = z.logsumexp(1), z.log_softmax(1)
    entropy = (p.exp() * p).sum(1)
    left_out = torch.tensor([False, False, True, True])
    lse, entropy = (t.double().masked_fill(left_out, 0) for t in (lse, entropy))
    grads = RowGrads(**{name.removeprefix("g_"): g[:, None] if name == "g_target" else g})
    a = HeadArgs(x, w, None, y[:, None], None, (), 0, 1 << 30)
    dx, dw, _ = heads.backward(a, lse, entropy.float() if name == "g_neg_entropy" else None, grads, (True, True, False))

    leaves = [t.double().requires_grad_() for t in (x, w)]
    z = leaves[0] @ leaves[1].t()
    p = z.log_softmax(1)
    value = {
        "g_lse": z.logsumexp(1), "g_target": z.gather(1, y[:, None])[:, 0], "g_sum": z.sum(1),
        "g_neg_entropy": (p.exp() * p).sum(1),
    }[name]  # fmt: skip
    expected = torch.autograd.grad((value * g).sum(), leaves)
    for found, exact in zip((dx, dw), expected):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)
