"""Random programs of a head whose loss reads the logits row by row, written from aten-level pieces, as text.

Rows may be [N], [B, T], shifted, or with the classes in the middle. Most programs keep to their row, and then hold no
logits if they are recognised; some cross rows on purpose (a softmax over tokens, batch statistics, a roll), and must
come out right all the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import torch
from text_programs import Text


class Shape(NamedTuple):
    """How logits come: head, the names of what goes along with their rows, and what it takes to see one class."""

    rows: str  # "n" for [N, V], "bt" for [B, T, V]
    labels: str
    weights: str
    temp: str
    trained: str
    mask: str
    hidden: str


FLAT = Shape("n", "y", "weights", "temp", "row", "mask_rows", "x")
GRID = Shape("bt", "y3", "weights3", "temp3", "row3", "mask_rows3", "x3")
SHIFTED = Shape(
    "bt", "y3[:, 1:]", "weights3[:, 1:]", "temp3[:, :-1]", "row3[:, :-1]", "mask_rows3[:, 1:]", "x3[:, :-1]"
)

HEADS = {
    "n": (
        "F.linear(x, w)", "F.linear(x, w, b)", "x @ w.T", "torch.addmm(b, x, w.t())", "aten.mm.default(x, w.t())",
        "F.linear(x, w) + F.linear(F.linear(x, down), up)", "torch.einsum('nh,vh->nv', x, w)", "F.linear(torch.tanh(x), w * 1.0)",
        "aten.linear.default(x, w, b)", "F.linear(x, w) + 0.5 * (x @ down.T @ up.T)", "F.linear(x, w + up @ down)",
    ),
    "bt": (
        "F.linear(x3, w)", "F.linear(x3, w, b)", "x3 @ w.T", "torch.einsum('bth,vh->btv', x3, w)", "torch.matmul(x3, w.t()) + b",
        "F.linear(x3, w) + F.linear(F.linear(x3, down), up)", "F.linear(x3.flatten(0, 1), w).unflatten(0, (-1, 6))",
        "F.linear(x3, w) - 0.3 * F.linear(x3, w2)",
    ),
}  # fmt: skip
POINTWISE = (
    "z * 0.7", "z / 1.7", "-z", "z + 0.5", "1.5 - z", "z * scale", "z / scale", "3 * torch.tanh(z / 3)", "scale * torch.tanh(z / scale)",
    "z + gain", "z * gain", "z - b", "z.clamp(-2.17, 2.31)", "z.clone()", "torch.sigmoid(z) * 4", "F.softplus(z)", "F.gelu(z)", "z.relu() + 0.1 * z",
    "z * torch.sigmoid(z)", "z * torch.rsqrt(z * z + 4.0)", "z.square() * 0.3", "torch.asinh(z)", "z.atan()", "z.sign() * z.abs().log1p()",
    "z.float() if z.dtype == torch.bfloat16 else z", "aten.mul.Tensor(z, 0.5)", "aten.add.Tensor(z, z, alpha=-0.25)", "z.pow(3) * 0.1", "z.exp().log1p()",
    "torch.where(z > 0.05, z, z * 0.3)", "F.leaky_relu(z, 0.2)", "F.silu(z)", "torch.lerp(z, z.detach(), 0.3)", "z.sin() + z", "F.hardtanh(z, -2.2, 2.1)",
    "torch.addcmul(z, z, gain, value=0.2)", "z.expm1().clamp(max=9.0)", "torch.erf(z) * 2", "aten.hardswish.default(z)", "z.remainder(7.0)",
)  # fmt: skip
DETACHED = (
    "z + z.detach() * 0.5", "z * z.detach().sigmoid()", "z - z.detach() + torch.tanh(z)", "z.detach() + 0.1 * z", "z * torch.rsqrt(z.detach().square() + 1.0)",
    "Half.apply(z)", "Capped.apply(z)", "Straight.apply(z)", "z - z.max(-1, keepdim=True).values.detach()", "z - z.logsumexp(-1, keepdim=True).detach()",
)  # fmt: skip
BY_ROW = (
    "z / {temp}[..., None]", "z * {temp}.unsqueeze(-1)", "z / ({trained}[..., None].abs() + 0.5)", "z + {trained}[..., None]", "z * {weights}[..., None].log1p()",
    "z - z.amax(-1, keepdim=True)", "z - z.mean(-1, keepdim=True)", "z - z.logsumexp(-1, keepdim=True)", "z / z.norm(dim=-1, keepdim=True) * 3",
    "(z - z.mean(-1, keepdim=True)) / (z.var(-1, keepdim=True) + 0.1).sqrt()", "F.layer_norm(z, (37,))", "F.normalize(z, dim=-1) * 4", "z.log_softmax(-1)",
    "z.softmax(-1).clamp_min(1e-9).log()", "z - z.gather(-1, {labels}[..., None])", "torch.where({mask}[..., None], z, z * 0.5)",
    "z.masked_fill(~{mask}[..., None], 0.0)", "z.scatter(-1, {labels}[..., None], 0.25)", "z.scatter_add(-1, {labels}[..., None], z[..., :1] * 0.5)",
    "z - 0.35 * F.one_hot({labels}, 37)", "torch.where(z >= z.topk(5, -1).values[..., -1:], z, -1e4 + 0 * z)", "z / z.std(-1, keepdim=True)",
    "z.sort(-1).values", "z.flip(-1)", "z.roll(1, -1)", "z.cumsum(-1) * 0.2", "z[..., torch.arange(36, -1, -1)]",
    "torch.where(torch.arange(37) == {labels}[..., None], z - 0.2, z)", "z + 0.1 * z.softmax(-1)", "z / ({hidden}.square().mean(-1, keepdim=True) + 1)",
    "z * torch.sigmoid({hidden} @ w[3])[..., None]", "z - {hidden}.tanh().sum(-1)[..., None] * 0.1",
)  # fmt: skip
BY_CLASS = (
    "z.masked_fill(mask_classes, -1e4)", "torch.where(mask_classes, z * 0.1, z)", "z.masked_fill(torch.arange(37) > 33, -1e9)", "z * (~mask_classes)",
    "z.index_fill(-1, torch.tensor([3, 5]), -1e4)", "z + classes.log()", "torch.cat([z[..., :36], z[..., 36:] * 0.5], -1)", "z.clamp(max=classes + 1.0)",
)  # fmt: skip
IN_PLACE = ("z.mul_(0.6)", "z.div_(1.3)", "z.add_(0.3)", "z[..., 34:] = -1e4", "z.masked_fill_(mask_classes, -1e4)", "z.sub_(z.detach().amax(-1, keepdim=True))", "z.tanh_()")  # fmt: skip
CROSSING = (
    "z - z.amax()", "z / z.abs().max()", "z - z.mean({d}, keepdim=True)", "(z - z.mean({d}, keepdim=True)) / (z.std({d}, keepdim=True) + 0.1)", "z.softmax({d})",
    "z.log_softmax({d})", "z.roll(1, {d})", "z.flip({d})", "z.sort({d}).values", "z.cumsum({d}) * 0.2", "z - z.logsumexp({d}, keepdim=True)", "z + z[:1]",
    "z * z.softmax({d})", "z.logcumsumexp({d})", "z[torch.arange(z.shape[0] - 1, -1, -1)]", "z - z.amax({d}, keepdim=True)", "z + 0.1 * z.sum()",
    "z[:, :1] + z if z.dim() == 3 else z + z[2]", "z.cummax({d}).values", "F.normalize(z, dim={d}) * 3", "z / z.norm()", "z - z.median({d}, keepdim=True).values",
)  # fmt: skip
# Statistics of a row, [N] or [B, T].
STATS = (
    "F.cross_entropy(z.movedim(-1, 1), {labels}, reduction='none')", "z.mT.logsumexp(-2)", "-z.mT.log_softmax(-2).gather(-2, {labels}.unsqueeze(-2)).squeeze(-2)",
    "-z.log_softmax(-1).gather(-1, {labels}[..., None])[..., 0]", "z.logsumexp(-1) - z.gather(-1, {labels}[..., None]).squeeze(-1)", "z.logsumexp(-1)",
    "F.cross_entropy(z.flatten(0, -2), {labels}.flatten(), reduction='none').view({labels}.shape)", "z.logsumexp(-1).square()", "z.amax(-1)", "z.sum(-1)",
    "-(z.softmax(-1) * z.log_softmax(-1)).sum(-1)", "z.softmax(-1).gather(-1, {labels}[..., None])[..., 0].log()", "z.mean(-1).square()", "z.std(-1)",
    "z.take_along_dim({labels}[..., None], -1)[..., 0]", "z.log_softmax(-1).square().mean(-1)", "z.square().sum(-1) * 0.1", "z.softmax(-1).square().sum(-1)",
    "z.topk(3, -1).values.sum(-1)", "z.max(-1).values - z.logsumexp(-1)", "(z.argmax(-1) == {labels}).to(z.dtype)", "z[..., 4]", "z.norm(dim=-1)",
    "-(F.one_hot({labels}, 37) * z.log_softmax(-1)).sum(-1)", "F.softplus(-(z.gather(-1, {labels}[..., None])[..., 0] - z.mean(-1)))",
    "F.softplus(torch.where(torch.arange(37) == {labels}[..., None], -torch.inf, z - z.gather(-1, {labels}[..., None])).logsumexp(-1))",
    "z.exp().sum(-1).log()", "(z.softmax(-1) * gain).sum(-1)", "torch.nan_to_num(z.log_softmax(-1)).sum(-1)", "z.relu().sum(-1)", "(z > 0.4).sum(-1).to(z.dtype) * z[..., 0]",
    "F.kl_div(z.log_softmax(-1), (z * 0.5).detach().softmax(-1), reduction='none').sum(-1)", "F.binary_cross_entropy_with_logits(z, (z.detach() > 1).to(z.dtype), reduction='none').sum(-1)",
    "(z.topk(2, -1).values[..., 0] - z.topk(2, -1).values[..., 1])", "-z.log_softmax(-1).mean(-1)", "aten._log_softmax.default(z, -1, False).amax(-1)", "torch.special.logsumexp(z, -1)",
    "(z.log_softmax(-1) - Q).exp().sum(-1)", "(Q.exp() * (Q - z.log_softmax(-1))).sum(-1)", "(z - Q).square().mean(-1)", "z.kthvalue(5, -1).values", "z.prod(-1) * 1e-3",
)  # fmt: skip
ROW_MATHS = (
    "s * {weights}", "s * {mask}", "s.clamp(max=3.217)", "s.exp().clamp(max=5.1)", "torch.where({mask}, s, 0.0)", "s / {temp}", "s * s.detach()", "(s - s.detach()).exp()",
    "torch.minimum(s, {weights} + 0.3)", "s * {trained}", "s.square()", "F.logsigmoid(s)", "(1 - (-s).exp()) ** 2 * s", "s + {trained}", "s.masked_fill({mask}, 0.5)",
    "torch.min((s - s.detach()).exp() * {weights}, (s - s.detach()).exp().clamp(0.8, 1.2) * {weights})", "s.abs()", "s * ({labels} != 3)", "s - 0.3 * s.mean()", "s.tanh()",
    "s * {hidden}.norm(dim=-1)", "({hidden} * s[..., None]).square().sum(-1)", "s * torch.sigmoid(({hidden} * w[5]).sum(-1))", "s + 0.1 * ({hidden} * s.detach()[..., None]).sum(-1)",
)  # fmt: skip
ENDS = (
    "s.mean()", "s.sum()", "(s * {weights}).sum() / {weights}.sum()", "s", "(s * {mask}).sum() / {mask}.sum()", "s.square().mean()", "s.sum() / {labels}.numel()", "s[{mask}].sum()",
    "s.sum(-1).mean()", "s.softmax(-1).square().sum()", "s.logsumexp(-1).sum()", "s.cumsum(0).mean()", "torch.sort(s.flatten()).values[:5].sum()", "s.max() - s.mean()", "-F.logsigmoid(s.sum())",
)  # fmt: skip
# What ends a program without a statistic of ours.
WHOLE = (
    "F.cross_entropy(z.movedim(-1, 1), {labels})", "F.nll_loss(z.movedim(-1, 1).log_softmax(1), {labels}, reduction='sum')", "F.cross_entropy(z.movedim(-1, 1), {labels}, classes)",
    "F.cross_entropy(z.flatten(0, -2), {labels}.flatten())", "F.cross_entropy(z.flatten(0, -2), {labels}.flatten(), reduction='sum', ignore_index=3)",
    "F.cross_entropy(z.flatten(0, -2), {labels}.flatten(), label_smoothing=0.1)", "F.cross_entropy(z.flatten(0, -2), {labels}.flatten(), classes)",
    "F.nll_loss(z.log_softmax(-1).flatten(0, -2), {labels}.flatten())", "F.kl_div(z.log_softmax(-1), Q, log_target=True, reduction='batchmean')",
)  # fmt: skip
CROSSING_ODDS = 0.15

SETUP = """
class Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z * 2
    @staticmethod
    def backward(ctx, g):
        return g * 0.5

class Capped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return 2 * torch.tanh(z / 2)
    @staticmethod
    def backward(ctx, g):
        (z,) = ctx.saved_tensors
        return g * (1 - torch.tanh(z / 2) ** 2)

class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z.round()
    @staticmethod
    def backward(ctx, g):
        return g
"""
NARROW_UNSAFE = ("topk", "sort", "argmax", "round", "Straight", "kthvalue", "median", "> 0.", "cummax", "sign", "amax", "max", "clamp", "relu", "remainder", "prod", "abs", "hard", "minimum", "torch.min")  # fmt: skip


def _one(rng: random.Random) -> Text:
    shape = rng.choice((FLAT, FLAT, GRID, SHIFTED))
    names = {k: getattr(shape, k) for k in ("labels", "weights", "temp", "trained", "mask", "hidden")}
    lines = [f"z = {rng.choice(HEADS[shape.rows])}"]
    if shape is SHIFTED:
        lines.append("z = z[:, :-1]")
    elif shape is GRID and rng.random() < 0.15:
        lines.append("z = z.transpose(1, 2).mT")
    crossing = rng.random() < CROSSING_ODDS
    places = [POINTWISE] * 4 + [BY_ROW] * 3 + [BY_CLASS] + [DETACHED]
    steps = [rng.choice(rng.choice(places)) for _ in range(rng.choice((0, 0, 1, 1, 2, 3)))]
    if crossing:
        steps.insert(rng.randint(0, len(steps)), rng.choice(CROSSING))
    dims = ("0", "0", "1", "-2") if shape.rows == "bt" else ("0", "0", "-2")
    for step in steps:
        line = f"z = {step.format(**names, d=rng.choice(dims))}"
        lines += [f"with torch.no_grad():\n    t = {line[4:]}\nz = z + 0.5 * t"] if rng.random() < 0.07 else [line]
        if rng.random() < 0.08:
            lines += ["z = z * 1.0", rng.choice(IN_PLACE)]
    if rng.random() < 0.05:
        lines.append(rng.choice(IN_PLACE))
    stats = [rng.choice(STATS) for _ in range(rng.choice((1, 1, 1, 2)))]
    whole = rng.choice(WHOLE) if rng.random() < 0.25 else ""
    if any("Q" in s for s in (*stats, whole)):
        other = "F.linear(x3, w2)" if shape.rows == "bt" else "F.linear(x, w2)"
        cut = "[:, :-1]" if shape is SHIFTED else ""
        q = f"Q = {other}{cut}.log_softmax(-1)"
        lines.append(f"with torch.no_grad():\n    {q}" if rng.random() < 0.7 else q)
    if whole:
        lines.append(f"loss = {whole.format(**names)}")
        if rng.random() < 0.5:
            lines.append(f"loss = loss + 0.1 * ({stats[0].format(**names)}).mean()")
    else:
        lines.append(f"s = {stats[0].format(**names)}")
        lines += [f"s = s {rng.choice('+-*')} 0.5 * ({s.format(**names)})" for s in stats[1:]]
        lines += [f"s = {rng.choice(ROW_MATHS).format(**names)}" for _ in range(rng.choice((0, 0, 1, 2)))]
        lines.append(f"loss = {rng.choice(ENDS).format(**names)}")
    if rng.random() < 0.12:
        lines.append("loss = loss + 0.2 * F.cross_entropy(F.linear(x, w2), y)")
    text = "\n".join(lines)
    unsafe = any(word in text for word in NARROW_UNSAFE)
    dtype = "float64" if unsafe else rng.choice(("float32", "float32", "float64", "bfloat16"))
    setup = SETUP if ".apply(" in text else ""
    mode = rng.random()
    autocast = dtype == "float32" and rng.random() < 0.1
    return Text(
        f"{text}\nreturn loss", dtype=dtype, setup=setup, grad=rng.random() < 0.9, autocast=autocast,
        dynamic=True if mode < 0.12 else None, marked=0.12 <= mode < 0.2, batches=(6,) if mode < 0.24 else (),
    )  # fmt: skip


def programs(seed: int) -> Iterator[Text]:
    """Those that eager takes and whose results are finite."""
    rng = random.Random(seed)
    while True:
        text = _one(rng)
        try:
            fn, _ = text.functions()
            args = text.inputs()
            with torch.set_grad_enabled(text.grad):
                values = [fn(*args)]
            if values[0].requires_grad:
                values[0].sum().backward()
                values += [t.grad for t in args if t.grad is not None]
        except Exception:
            continue
        if all(v.isfinite().all() and v.abs().max() < 1e5 for v in values):
            yield text
