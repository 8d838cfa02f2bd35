"""The stage before autograd: which returned logits it defers, into what, and that all stays as eager has it."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from defer_cases import DEFERRED, KEPT
from harness import Compiled, H, N, V, aten_graph, dynamo_graph, fresh, head, listing
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

import lce_inductor.returned_logits.stage as stage
from lce_inductor import Config, regions
from lce_inductor.graph.write import sort
from lce_inductor.passes import DeferPass
from lce_inductor.returned_logits import defer_returned
from lce_inductor.schedule import schedule

Fn = Callable[..., Any]
ALL = Config(min_logits_bytes=0)

_lib = torch.library.Library("lce_test", "DEF")
_lib.define("mystery(Tensor z) -> Tensor")
_lib.impl("mystery", lambda z: z.mean(), "CompositeExplicitAutograd")
_lib.impl("mystery", lambda z: z.new_empty([]), "Meta")
_lib.impl("mystery", lambda z: _Mystery.apply(z), "Autograd")


class _Mystery(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.size = z.shape
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.lce_test.mystery(z)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.expand(ctx.size) / ctx.size.numel()


class _Pass(CustomGraphPass):
    def __init__(self, run: Callable[[Graph], None]) -> None:
        self.run = run

    def __call__(self, graph: Graph) -> None:
        self.run(graph)

    def uuid(self) -> Any:
        return None


@contextlib.contextmanager
def both_stages(config: Config = ALL) -> Iterator[list[str]]:
    """This stage, and after autograd the one that rewrites the regions; what they did."""
    log: list[str] = []

    def before(graph: Graph) -> None:
        log.extend("deferred" for _ in defer_returned(graph, config))

    def joint(graph: Graph) -> None:
        decision = regions.decide(graph, config)
        if decision.chosen:
            regions.apply(graph, decision, config)
            log.extend("rewritten" for _ in decision.chosen)
            schedule(graph, config)
            sort(graph)
            graph.eliminate_dead_code()

    with inductor.patch(
        pre_grad_custom_pass=_Pass(before), joint_custom_pre_pass=_Pass(joint), fx_graph_cache=False
    ), torch._functorch.config.patch(enable_autograd_cache=False):  # fmt: skip
        yield log


def defer(gm: torch.fx.GraphModule, config: Config = ALL) -> int:
    made = defer_returned(gm.graph, config)
    gm.graph.lint()
    gm.recompile()
    return len(made)


def differentiated(fn: Fn, args: Any, only: Callable[[Tensor], bool] = lambda t: t.dim() < 2) -> list[Tensor | None]:
    """Outputs, then the gradients of the arguments from outputs that are no logits, then the arguments afterwards."""
    outputs = [t for t in torch.utils._pytree.tree_leaves(fn(*args)) if isinstance(t, Tensor)]
    roots = [t for t in outputs if t.requires_grad and only(t)]
    values: list[Tensor | None] = [t.detach().clone() for t in outputs]
    if roots:
        torch.autograd.backward([t.sum() for t in roots])
    return [*values, *(a.grad for a in args), *(a.detach() for a in args)]


def compare(fn: Any, args: Any, **options: Any) -> tuple[list[str], Compiled]:
    """Compiled through both stages, and eager."""
    expected = differentiated(fn, fresh(args))
    flags = [t.requires_grad for t in torch.utils._pytree.tree_leaves(fn(*fresh(args)))]
    with both_stages() as log:
        compiled = Compiled(fn, **options)
        found = differentiated(compiled, fresh(args))
        outputs = torch.utils._pytree.tree_leaves(compiled(*fresh(args)))
    assert [t.requires_grad for t in outputs] == flags
    assert len(found) == len(expected)
    for i, (ours, theirs) in enumerate(zip(found, expected)):
        if ours is None or theirs is None:  # torch.compile has zeros where eager has None
            assert all(t is None or not t.any() for t in (ours, theirs)), f"result {i}"
        else:
            low = "bfloat16" in fn.__code__.co_names
            tolerance = {"rtol": 2e-2, "atol": 2e-2} if low else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(ours, theirs, **tolerance, msg=lambda m, i=i: f"result {i}: {m}")
    return log, compiled


@pytest.mark.parametrize("name", DEFERRED)
def test_deferred(name: str) -> None:
    """The values, gradients and requires_grad of eager; and no tensor of the size of the logits."""
    fn, count = DEFERRED[name]
    log, compiled = compare(fn, head())
    assert log.count("deferred") == count, log
    if name not in ("one_head_can_not", "through_a_buffer"):  # one head stays; the empty buffer is read as a whole
        largest = max(compiled.graphs, key=lambda g: g.largest)
        assert largest.largest < N * V * 5 // 6 - V, f"{largest.largest_node}\n{largest.text}"


@pytest.mark.parametrize("name", ["plain", "shifted", "some_classes", "autocast", "softcapped", "two_heads"])
def test_deferred_with_dynamic_shapes(name: str) -> None:
    log, _ = compare(DEFERRED[name][0], head(), dynamic=True)
    assert "deferred" in log


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str, caplog: pytest.LogCaptureFixture) -> None:
    fn, why = KEPT[name]
    gm = dynamo_graph(fn, *head())
    before = listing(gm)
    with caplog.at_level(logging.DEBUG, "lce_inductor"):
        assert defer(gm) == 0
    assert listing(gm) == before
    assert why in caplog.text


@pytest.mark.parametrize("name", KEPT)
def test_kept_is_right(name: str) -> None:
    log, _ = compare(KEPT[name][0], head())
    assert "deferred" not in log


# -- when nothing is deferred


def test_settings():
    gm = dynamo_graph(DEFERRED["plain"][0], *head())
    size = N * V * 4
    assert defer(gm, Config(min_logits_bytes=0, returned_logits="keep")) == 0
    assert defer(gm, Config(min_logits_bytes=size + 1)) == 0
    assert defer(gm, Config(min_logits_bytes=size)) == 1


def test_only_graphs_of_dynamo():
    """Who calls another graph may not know what to do with such a tensor."""
    gm = aten_graph(lambda x, w, y: DEFERRED["plain"][0](x, w, y), *head())
    assert defer(gm) == 0


def test_nothing_is_traced_without_a_candidate(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stage, "trace", lambda *a: pytest.fail("traced"))

    def loss_only(x, w, y):
        h = torch.tanh(x @ w[:8])
        return F.cross_entropy(F.linear(h, w), y), h

    assert defer(dynamo_graph(loss_only, *head())) == 0


def test_a_function_that_is_called_like_a_product():
    def linear(a: Tensor, b: Tensor) -> Tensor:
        return a[:, :1] + b[:, 0]

    gm = dynamo_graph(lambda x, w, y: DEFERRED["plain"][0](x, w, y), *head())
    (node,) = (n for n in gm.graph.nodes if n.target is torch._C._nn.linear)
    node.target = linear
    assert defer(gm) == 0


class KeepsAnything(nn.Module):
    def __init__(self, logits: bool) -> None:
        super().__init__()
        self.head, self.logits = nn.Linear(H, V), logits
        self.register_buffer("last", torch.zeros(N, V))
        self.register_buffer("hits", torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = self.head(x)
        with torch.no_grad():
            if self.logits:
                self.last.copy_(z)
            else:
                self.hits.add_((z.argmax(-1) == y).sum())
        return F.cross_entropy(z, y), z


@pytest.mark.parametrize("logits", [False, True])
def test_buffers(logits: bool):
    """A buffer that is written to is an output, too."""
    x, _, y = head()
    torch.manual_seed(0)
    model = KeepsAnything(logits)
    other = copy.deepcopy(model)
    with both_stages() as log:
        loss, z = Compiled(model)(x, y)
        loss.backward()
    expected, z_expected = other(x, y)
    expected.backward()
    assert ("deferred" in log) == (not logits)
    torch.testing.assert_close((loss, z.detach() + 0), (expected, z_expected.detach()))
    for ours, theirs in zip(model.state_dict().values(), other.state_dict().values()):
        torch.testing.assert_close(ours, theirs)
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


# -- failures


def test_a_failure_leaves_the_graph(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    for place, name in ((stage, "find"), (stage, "trace"), (stage.Deferral, "_check_values")):
        gm = dynamo_graph(DEFERRED["two_heads"][0], *head())
        before = listing(gm)
        counters.clear()

        def fail(*args: Any) -> None:
            raise ZeroDivisionError("planted")

        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "lce_inductor"):
            patch.setattr(place, name, fail)
            DeferPass(ALL)(gm.graph)
        assert listing(gm) == before
        assert counters["lce_inductor"]["refused:internal-error"] == 1
        assert caplog.text.count("planted") == 1
        caplog.clear()
        assert defer(gm) == 2


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_modes_after_a_tail_that_fails(error: type[BaseException]):
    """Grad mode and autocast are what they were, whatever the user's operations do."""

    def fn(x, w, y):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            z = F.linear(x, w)
            torch.sin(z)
        return F.cross_entropy(z.float(), y), z.float()

    def planted(z: Tensor) -> None:
        raise error("planted")

    gm = dynamo_graph(fn, *head())
    (node,) = (n for n in gm.graph.nodes if n.target is torch.sin)
    node.target = planted
    with contextlib.suppress(KeyboardInterrupt):
        assert defer_returned(gm.graph, ALL) == []
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_no_guards_and_no_symbols():
    """The trace of the tail is nobody's business."""

    def fn(x, w, y):
        z = F.linear(x, w)
        return F.cross_entropy(z, y) + z.detach()[y >= 0].sum(), z

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        gm = dynamo_graph(fn, *head(), dynamic=True)
    value = next(n for n in gm.graph.nodes if n.op == "placeholder" and "x" in n.name).meta["example_value"]
    env = value.fake_mode.shape_env
    before = (len(env.guards), dict(env.replacements), list(env.pending_fresh_unbacked_symbols))
    assert defer(gm) == 1
    assert (len(env.guards), dict(env.replacements), list(env.pending_fresh_unbacked_symbols)) == before


# -- what must not make a difference, and what must

PIECES = ("x", "weight", "loss", "returned")


@pytest.mark.parametrize("kind", ["detach", "no_grad"])
@pytest.mark.parametrize("pieces", [c for n in range(5) for c in itertools.combinations(PIECES, n)], ids="-".join)
def test_pieces_without_gradient(kind: str, pieces: tuple[str, ...]):
    def cut(name: str, value: Callable[[], Tensor]) -> Tensor:
        if name not in pieces:
            return value()
        if kind == "detach":
            return value().detach()
        with torch.no_grad():
            return value()

    def fn(x: Tensor, w: Tensor, y: Tensor) -> Any:
        h, v = cut("x", lambda: x * 2), cut("weight", lambda: w * 3)
        z = F.linear(h, v)
        loss = cut("loss", lambda: F.cross_entropy(z, y))
        return loss + x.sum(), cut("returned", lambda: z * 0.5)

    log, _ = compare(fn, head())
    differentiated_outside = "loss" in pieces and "returned" not in pieces and not {"x", "weight"} <= set(pieces)
    assert log.count("deferred") == (0 if differentiated_outside else 1)


@pytest.mark.parametrize("name", ["plain", "softcapped", "two_heads", "shifted", "autocast", "bias_added"])
def test_evaluation(name: str):
    """Under no_grad around the compiled function."""
    x, w, y = head()
    fn = DEFERRED[name][0]
    with torch.no_grad(), both_stages() as log:
        compiled = Compiled(fn)
        ours, theirs = compiled(x, w, y), fn(x, w, y)
    assert "deferred" in log
    for a, b in zip(ours, theirs):
        assert not a.requires_grad
        torch.testing.assert_close(a.clone(), b, rtol=2e-2, atol=2e-2)


def test_inference_mode():
    x, w, y = head()
    with torch.inference_mode(), both_stages() as log:
        ours, theirs = Compiled(DEFERRED["plain"][0])(x, w, y), DEFERRED["plain"][0](x, w, y)
        torch.testing.assert_close(ours[1].clone(), theirs[1])
    assert "deferred" in log


def test_gradient_that_reaches_deferred_logits():
    with both_stages():
        loss, z = Compiled(DEFERRED["plain"][0])(*fresh(head()))
        with pytest.raises(RuntimeError, match="would be lost"):
            (loss + z.sum()).backward()
