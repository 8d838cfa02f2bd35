"""Graphs before and after the stage that defers returned logits.

To accept a wanted change of these graphs: EXPECTTEST_ACCEPT=1 python -m pytest tests/test_defer_graphs.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from defer_cases import DEFERRED
from expecttest import assert_expected_inline
from harness import V, dynamo_graph, head, listing

from lce_inductor import Config
from lce_inductor.returned_logits import defer_returned

Fn = Callable[..., Any]


def show(fn: Fn, *args: Any, **options: Any) -> str:
    gm = dynamo_graph(fn, *args, **options)
    before = listing(gm)
    assert defer_returned(gm.graph, Config(min_logits_bytes=0))
    gm.graph.lint()
    return f"{before}\n->\n{listing(gm)}\n"


def test_graph_of_linear_and_cross_entropy():
    assert_expected_inline(
        show(DEFERRED["plain"][0], *head()),
        """\
z = linear(x, w)
cross_entropy = cross_entropy(z, y)
return (cross_entropy, z)
->
z = linear(x, w)
cross_entropy = cross_entropy(z, y)
defer_logits_default = lce_inductor.defer_logits(x, w, None, '', torch.float32, torch.float32, False, True)
return (cross_entropy, defer_logits_default)
""",
    )


def test_graph_with_bias_softcap_and_cast():
    def fn(x, w, b, y):
        z = (5.0 * torch.tanh((F.linear(x, w) + b) / 5.0)).float()
        return {"loss": F.cross_entropy(z, y), "logits": z}

    x, w, y = head(dtype=torch.bfloat16)
    assert_expected_inline(
        show(fn, x, w, w[:, 0].detach(), y),
        """\
linear = linear(x, w)
add = add(linear, b)
truediv = truediv(add, 5.0)
tanh = tanh(truediv)
mul = mul(5.0, tanh)
z = .float(mul)
cross_entropy = cross_entropy(z, y)
return (cross_entropy, z)
->
linear = linear(x, w)
add = add(linear, b)
truediv = truediv(add, 5.0)
tanh = tanh(truediv)
mul = mul(5.0, tanh)
z = .float(mul)
cross_entropy = cross_entropy(z, y)
defer_logits_default = lce_inductor.defer_logits(x, w, b, 'div 5.0;tanh;mul 5.0', torch.bfloat16, torch.float32, False, True)
return (cross_entropy, defer_logits_default)
""",
    )


def test_graph_of_a_scale_and_of_some_classes():
    def fn(x, w, scale, y):
        z = (F.linear(x, w) * scale)[:, :-4]
        return F.cross_entropy(z, y % 30), z

    x, w, y = head()
    assert_expected_inline(
        show(fn, x, w, torch.tensor(2.0, requires_grad=True), y),
        """\
linear = linear(x, w)
mul = mul(linear, scale)
z = getitem(mul, (slice(None, None, None), slice(None, -4, None)))
mod = mod(y, 30)
cross_entropy = cross_entropy(z, mod)
return (cross_entropy, z)
->
linear = linear(x, w)
mul = mul(linear, scale)
z = getitem(mul, (slice(None, None, None), slice(None, -4, None)))
mod = mod(y, 30)
cross_entropy = cross_entropy(z, mod)
mul_tensor = aten.mul.Tensor(x, scale)
slice_tensor = aten.slice.Tensor(w, 0, 0, -4)
defer_logits_default = lce_inductor.defer_logits(mul_tensor, slice_tensor, None, '', torch.float32, torch.float32, False, False)
return (cross_entropy, defer_logits_default)
""",
    )


def test_graph_of_selected_rows():
    def fn(x, w, y):
        z = F.linear(x.view(4, 6, -1), w)
        return F.cross_entropy(z.view(-1, V), y), z[:, -1:].detach()

    assert_expected_inline(
        show(fn, *head()),
        """\
view = .view(x, 4, 6, -1)
z = linear(view, w)
view_1 = .view(z, -1, 37)
cross_entropy = cross_entropy(view_1, y)
getitem = getitem(z, (slice(None, None, None), slice(-1, None, None)))
detach = .detach(getitem)
return (cross_entropy, detach)
->
view = .view(x, 4, 6, -1)
z = linear(view, w)
view_1 = .view(z, -1, 37)
cross_entropy = cross_entropy(view_1, y)
getitem = getitem(z, (slice(None, None, None), slice(-1, None, None)))
detach = .detach(getitem)
slice_tensor = aten.slice.Tensor(view, 1, 5, 6, 1)
detach_default = aten.detach(slice_tensor)
detach_default_1 = aten.detach(w)
defer_logits_default = lce_inductor.defer_logits(detach_default, detach_default_1, None, '', torch.float32, torch.float32, False, False)
return (cross_entropy, defer_logits_default)
""",
    )


def test_graph_under_autocast():
    assert_expected_inline(
        show(DEFERRED["autocast"][0], *head()),
        """\
_enter_autocast = _enter_autocast('cpu', torch.bfloat16, True, None)
z = linear(x, w)
_enter_autocast_1 = _enter_autocast('cpu', None, False, None)
float_1 = .float(z)
loss = cross_entropy(float_1, y)
_exit_autocast = _exit_autocast(_enter_autocast_1)
_exit_autocast_1 = _exit_autocast(_enter_autocast)
float_2 = .float(z)
return (loss, float_2)
->
_enter_autocast = _enter_autocast('cpu', torch.bfloat16, True, None)
z = linear(x, w)
_enter_autocast_1 = _enter_autocast('cpu', None, False, None)
float_1 = .float(z)
loss = cross_entropy(float_1, y)
_exit_autocast = _exit_autocast(_enter_autocast_1)
_exit_autocast_1 = _exit_autocast(_enter_autocast)
float_2 = .float(z)
defer_logits_default = lce_inductor.defer_logits(x, w, None, '', torch.bfloat16, torch.float32, False, True)
return (loss, defer_logits_default)
""",
    )


def test_graph_with_dynamic_shapes():
    def fn(x, w, y):
        z = F.linear(x.unsqueeze(0), w)
        return F.cross_entropy(z.squeeze(0), y), z[:, 1:]

    assert_expected_inline(
        show(fn, *head(), dynamic=True),
        """\
unsqueeze = .unsqueeze(x, 0)
z = linear(unsqueeze, w)
squeeze = .squeeze(z, 0)
cross_entropy = cross_entropy(squeeze, y)
getitem = getitem(z, (slice(None, None, None), slice(1, None, None)))
return (cross_entropy, getitem)
->
unsqueeze = .unsqueeze(x, 0)
z = linear(unsqueeze, w)
squeeze = .squeeze(z, 0)
cross_entropy = cross_entropy(squeeze, y)
getitem = getitem(z, (slice(None, None, None), slice(1, None, None)))
sym_size_int = aten.sym_size.int(unsqueeze, 2)
sym_size_int_1 = aten.sym_size.int(unsqueeze, 1)
reshape_default = aten.reshape(unsqueeze, [sym_size_int_1, sym_size_int])
slice_tensor = aten.slice.Tensor(reshape_default, 0, 1, 9223372036854775807, 1)
sym_size_int_2 = aten.sym_size.int(slice_tensor, 0)
reshape_default_1 = aten.reshape(slice_tensor, [1, sym_size_int_2, sym_size_int])
defer_logits_default = lce_inductor.defer_logits(reshape_default_1, w, None, '', torch.float32, torch.float32, False, False)
return (cross_entropy, defer_logits_default)
""",
    )


def test_graph_of_two_heads():
    assert_expected_inline(
        show(DEFERRED["two_heads"][0], *head()),
        """\
a = linear(x, w)
tanh = .tanh(x)
b = linear(tanh, w)
cross_entropy = cross_entropy(a, y)
cross_entropy_1 = cross_entropy(b, y)
add = add(cross_entropy, cross_entropy_1)
return (add, a, b)
->
a = linear(x, w)
tanh = .tanh(x)
b = linear(tanh, w)
cross_entropy = cross_entropy(a, y)
cross_entropy_1 = cross_entropy(b, y)
add = add(cross_entropy, cross_entropy_1)
defer_logits_default = lce_inductor.defer_logits(x, w, None, '', torch.float32, torch.float32, False, True)
defer_logits_default_1 = lce_inductor.defer_logits(tanh, w, None, '', torch.float32, torch.float32, False, False)
return (add, defer_logits_default, defer_logits_default_1)
""",
    )
