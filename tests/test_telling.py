"""What is said is what happens: what counts as a head, hints that work, the code in force, the report of the process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Compiled, head
from test_explain import WIDE, codes, told
from test_hints import H, N, lin, plain
from test_watch import warnings_of
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

import lce_inductor
from lce_inductor import explain
from lce_inductor.reporting import history
from lce_inductor.reporting.records import NOWHERE


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    history.forget()
    yield
    history.forget()


# -- what is no head: nothing reads it as a loss does


class Adapted(nn.Module):
    def __init__(self, i: int, o: int, r: int = 4) -> None:
        super().__init__()
        self.base = nn.Linear(i, o, bias=False).requires_grad_(False)
        self.a, self.b = nn.Linear(i, r, bias=False), nn.Linear(r, o, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


class LowRank(nn.Module):
    """down, perhaps a norm, up: keys and values as multi-head latent attention makes them."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(64, 8), nn.Linear(8, 512)
        self.norm: nn.Module = nn.RMSNorm(8) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.norm(self.down(x)))


class Router(nn.Module):
    """Experts are chosen by a softmax, with the loss that keeps its logits small."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(64, 32), nn.Parameter(torch.randn(32, 64, 64))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        weight, chosen = logits.softmax(-1).topk(2)
        out = torch.einsum("nh,nkho->nko", x, self.experts[chosen])
        return (out * weight.unsqueeze(-1)).sum(1) + logits.logsumexp(-1).square().mean()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.mT
        return self.out(scores.softmax(-1) @ v) + scores.logsumexp(-1, keepdim=True) * 0.1


BODY: dict[str, Callable[[], nn.Module]] = {
    "adapters": lambda: nn.Sequential(Adapted(64, 256), nn.GELU(), Adapted(256, 64)),
    "an adapter": lambda: Adapted(8, 512),
    "low rank": lambda: LowRank(norm=False),
    "low rank with a norm": lambda: LowRank(norm=True),
    "wide layer": lambda: nn.Sequential(nn.Linear(64, 4096), nn.GELU(), nn.Linear(4096, 64)),
    "wide and activated": lambda: nn.Sequential(nn.Linear(64, 4096), nn.SiLU()),
    "router": Router,
    "attention": Attention,
}


@pytest.mark.parametrize("what", BODY)
def test_layers_are_no_heads(what, installed, caplog):
    """No warning, no counter, no row: neither of the compile, nor of explain() nor of report()."""
    block, x = BODY[what](), torch.randn(32, 64 if what != "an adapter" else 8)
    compiled = Compiled(block)
    compiled(x).sum().backward()
    assert warnings_of(caplog) == [] and not [k for k in compiled.counts if k.startswith("refused")]
    assert [r.code for r in told(block, x).records if not r.rewritten] == []
    assert [r for r in lce_inductor.report().records if not r.rewritten] == []


def test_a_body_of_adapters_and_its_head(installed):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(Adapted(64, 256), nn.GELU(), Adapted(256, 64)), nn.Linear(64, WIDE)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.head(x + self.body(x)), y)

    found = told(Model(), torch.randn(32, 64), torch.zeros(32, dtype=torch.long))
    assert codes(found) == [None] and found.held_bytes == 0


# -- losses without a head


def test_a_loss_without_a_head_is_counted(installed, caplog):
    z, y = torch.randn(N, WIDE, requires_grad=True), torch.randint(0, WIDE, (N,))
    torch.compile(F.cross_entropy)(z, y).backward()
    assert counters["lce_inductor"] == {"refused:no-head": 1}
    (text,) = warnings_of(caplog)
    assert f"{NOWHERE}: no-head: " in text


def test_stored_logits_of_a_teacher_are_no_head(installed):
    """They are a target. Trained ones are somebody's logits, and stay."""

    def fn(x, t, w):
        z = F.linear(x, w)
        return F.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="batchmean")

    x, t = torch.randn(N, H, requires_grad=True), torch.randn(N, WIDE)
    w = torch.randn(WIDE, H, requires_grad=True)
    found = told(fn, x, t, w)
    assert codes(found) == [None] and found.held_bytes == 0
    with torch.no_grad():
        assert codes(told(fn, x, t, w)) == [None]
    assert codes(told(fn, x, t.requires_grad_(), w)) == ["returned", "no-head"]


# -- saved means saved


@pytest.mark.parametrize("what", ["as they are", "transposed", "scaled"])
def test_returned_logits_are_held(what):
    scale = torch.rand(WIDE) + 0.5

    def fn(x, y):
        z = lin(x) * scale if what == "scaled" else lin(x)
        return F.cross_entropy(z, y), z.t() if what == "transposed" else z

    found = told(fn, torch.randn(N, H), torch.randint(0, WIDE, (N,)), returned_logits="keep")
    assert (found.saved_bytes, found.held_bytes) == (0, N * WIDE * 4) and codes(found) == ["returned"]


TWICE = {
    "returned": (lambda x, y: (F.cross_entropy(lin(x), y), lin(x)), ["returned"]),
    "returned first": (lambda x, y: (lin(x), F.cross_entropy(lin(x), y)), ["returned"]),
    "over rows": (lambda x, y: F.cross_entropy(lin(x), y) + lin(x).softmax(0).amax(), ["crossing"]),
    "two losses": (lambda x, y: F.cross_entropy(lin(x), y) + F.cross_entropy(lin(x), y - 1), [None, None]),
}


@pytest.mark.parametrize("what", TWICE)
def test_logits_that_are_written_twice_are_there_once(what):
    """torch.compile computes a product once; so does the package, and where one reader holds it nothing is saved."""
    fn, expected = TWICE[what]
    found = told(fn, torch.randn(N, H), torch.randint(1, WIDE, (N,)))
    assert codes(found) == expected
    assert (found.saved_bytes == 0) == (expected[0] is not None)


# -- the code in force


def batch(n: int = N) -> tuple[Tensor, Tensor]:
    return torch.randn(n, H), torch.randint(0, WIDE, (n,))


def test_install_after_the_first_call():
    compiled = torch.compile(plain, backend="inductor")
    compiled(*batch())
    lce_inductor.install(min_logits_bytes=0)
    found = explain(compiled)(*batch())
    assert codes(found) == ["compiled-before"] and found.saved_bytes == 0 and "torch._dynamo.reset()" in str(found)
    compiled(*batch())
    assert not counters["lce_inductor"], "as the table says"
    torch._dynamo.reset()
    assert codes(explain(compiled)(*batch())) == [None]
    compiled(*batch())
    assert counters["lce_inductor"]["rewritten"] + counters["lce_inductor"]["cached:rewritten"] == 1
    lce_inductor.uninstall()
    assert codes(explain(compiled)(*batch())) == [None], "the code that runs is the rewritten one"


def test_other_arguments_and_other_settings(installed):
    compiled = torch.compile(plain, dynamic=False)
    compiled(*batch())
    assert not [n for n in explain(compiled)(*batch()).notes if "arguments" in n]
    note = explain(compiled)(*batch(60)).notes[0]
    assert "not for these arguments" in note
    with lce_inductor.installed(min_logits_bytes=1 << 30):
        found = explain(compiled)(*batch())
        assert codes(found) == [None] and "other settings" in found.notes[0]
        assert codes(explain(compiled)(*batch(60))) == ["too-small"]


def test_the_limit_of_recompilations(installed):
    """Beyond it a call runs in eager mode, and the code that is there stays in force."""
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled = torch.compile(plain, dynamic=False)
        compiled(*batch())
        compiled(*batch(60))
        assert counters["lce_inductor"]["rewritten"] + counters["lce_inductor"]["cached:rewritten"] == 1
        found = explain(compiled)(*batch(60))
        assert codes(found) == ["recompile-limit"] and "dynamic=True" in found.records[0].hint
        assert codes(explain(compiled)(*batch())) == [None]
        torch._dynamo.reset()
        compiled = torch.compile(plain, dynamic=True)
        compiled(*batch())
        assert codes(explain(compiled)(*batch(60))) == [None], "as the hint says"


def test_parts_that_are_compiled_by_themselves(installed):
    block, projection = Adapted(H, H), nn.Linear(H, WIDE)
    block.compile()
    loss = torch.compile(lambda z, y: F.cross_entropy(z, y))

    def step(x, y):
        return loss(projection(block(x)), y)

    step(*batch()).backward()
    assert counters["lce_inductor"] == {"refused:no-head": 1}
    found = explain(step)(*batch())
    assert codes(found) == ["no-head"] and len(found.graphs) == 2 and "compiled parts" in str(found)
    assert codes(explain(torch.compile(step))(*batch())) == [None], "compiled as a whole, it is one graph"


def test_an_inner_model_that_is_compiled(installed):
    model = torch.compile(nn.Linear(H, WIDE))

    def eager(x, y):
        return F.cross_entropy(model(x), y)

    assert codes(explain(eager)(*batch())) == ["loss-outside"]
    compiled_loss = torch.compile(lambda z, y: F.cross_entropy(z, y))
    found = explain(lambda x, y: compiled_loss(model(x), y))(*batch())
    assert codes(found) == ["loss-outside"] * 2 and found.held_bytes == N * WIDE * 4
    assert codes(explain(torch.compile(eager))(*batch())) == [None]


def test_parts_from_before_install():
    loss = torch.compile(lambda x, y: F.cross_entropy(lin(x), y))

    def step(x, y):
        return loss(x, y) * 2

    step(*batch())
    lce_inductor.install(min_logits_bytes=0)
    assert codes(explain(step)(*batch())) == ["compiled-before"]


def test_compiled_parts_stay(installed):
    """Theirs is the code, and no entry of ours lies beside it."""
    from torch._dynamo.eval_frame import innermost_backend

    graphs = []

    def backend(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    part = torch.compile(plain, backend=backend)

    def step(x, y):
        return part(x, y) * 2

    step(*batch())
    assert codes(explain(step)(*batch())) == ["other-backend"]
    step(*batch())
    assert len(graphs) == 1 and callable(innermost_backend(backend))


def in_thread(fn: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(fn()), name="worker")
    thread.start()
    thread.join()
    return found[0]


def test_another_thread(installed):
    """From torch 2.13 on the hooks are a thread's own: told by what the thread's compile does."""
    before = in_thread(lambda: inductor.joint_custom_pre_pass is not None)
    found = in_thread(lambda: explain(torch.compile(plain))(*batch()))
    assert codes(found) == ([None] if before else ["not-installed"])
    assert before or "another thread" in str(found)


def test_half_of_the_hooks(installed):
    with inductor.patch(joint_custom_pre_pass=None):
        assert codes(explain(torch.compile(plain))(*batch())) == ["hooks-replaced"]
    with inductor.patch(pre_grad_custom_pass=None):
        found = explain(torch.compile(plain))(*batch())
    assert codes(found) == [None] and "returned logits" in found.notes[0]


def test_a_sum_of_exponentials_that_is_no_softmax():
    """A temperature for each row: there is one head here, and one loss."""

    def fn(x, w, y):
        return F.cross_entropy(F.linear(x, w) / x.exp().sum(-1, keepdim=True), y)

    x, *rest = head()
    assert codes(explain(fn, min_logits_bytes=0)(x.detach(), *rest)) == [None]
