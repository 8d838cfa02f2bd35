"""Operands of other shapes than the logits: to more rows, more dimensions, from one row or one class, with slices,
expanded views and labels of size one. What comes out of an operation has the shape that decides, not what goes in."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from text_programs import Text

# Logits: of all rows, of one, with more dimensions, vectors.
LOGITS = (
    *["F.linear(x, w)", "F.linear(x3, w)", "F.linear(x[:1], w)"] * 4, "F.linear(x3, w)", "F.linear(x[:1], w)", "F.linear(x3[:1], w)",
    "F.linear(x3[:, :1], w)", "F.linear(x[0], w)", "F.linear(x, w, b)", "x @ w.T", "F.linear(x[:, None], w)",
    "F.linear(x[None], w)", "F.linear(x, w[:1])", "F.linear(x3[1:2, -1:], w)", "(x3 @ w.T)", "F.linear(x3, w)[1]",
)  # fmt: skip
# Operands, each of a shape that fits some of them.
OPERANDS = (
    "0.7", "scale", "scale.detach()", "scale.reshape(1)", "scale.reshape(1, 1)", "scale.reshape(1, 1, 1)",
    "torch.full((1, 1, 1), 0.5, dtype=z.dtype)", "torch.full((1,), 0.5, dtype=z.dtype)", "torch.tensor(1.5, dtype=z.dtype)",
    "gain", "gain[None]", "gain[None, None]", "gain.expand(2, 1, 37)", "b[None, :]", "b.view(1, 1, -1)", "classes",
    "row[:, None]", "row[:6, None]", "row.view(-1, 1, 1)", "row[:1]", "row3[..., None]", "row3[:1, :, None]", "row3[:, None, :1]",
    "temp[:, None]", "temp3[..., None]", "temp3.unsqueeze(-1).expand(4, 6, 37)", "const", "const[:1]", "const[None]",
    "const[:, None]", "const[:6, :1]", "const.view(4, 6, 37)", "const[:4, None]", "x[:, :1]", "x3[..., :1]", "x3[:1, :1, :1]",
    "z.amax(-1, keepdim=True)", "z.detach().amax(-1, keepdim=True)", "z.amax()", "z.max()", "z.mean(-1, keepdim=True)",
    "z.logsumexp(-1, keepdim=True)", "z[..., :1]", "z[..., 3].unsqueeze(-1)", "z[:1]", "weights[:, None, None]",
    "F.linear(x, w2)", "F.linear(x3, w2)", "F.linear(x[:1], w2)", "F.linear(x3[:, :1], w2)", "w2.sum(-1)", "w.sum(1)[None]",
)  # fmt: skip
COMBINE = (
    *["z + {}", "z - {}", "z * {}", "z / {}"] * 4,
    "z + {}", "z - {}", "z * {}", "z / ({}).abs().add(0.5)", "{} + z", "{} - z", "torch.add(z, {}, alpha=0.5)", "torch.maximum(z, {} + 0 * z.sum())",
    "torch.where(z > 0.3, z, {})", "torch.where({} > 0, z, z * 0.5)", "torch.where({} > 0, z, -1e4)", "z.masked_fill({} > 1, -1e4)",
    "torch.lerp(z, z * 0 + {}, 0.3)", "torch.logaddexp(z, z * 0 + {})", "torch.addcmul(z, z, {} + 0 * z)", "z.add({})",
    "torch.broadcast_tensors(z, {})[0]", "z.expand(torch.broadcast_shapes(z.shape, torch.as_tensor({}).shape))",
)  # fmt: skip
SHAPES = (
    "z[-5:]", "z[1:-1]", "z[::2]", "z[1::3]", "z[..., ::2]", "z[..., -20:]", "z[..., :-3]", "z[:, -2:]", "z[-1:]", "z[0]", "z[-1]",
    "z.expand(3, *z.shape)", "z[None]", "z.unsqueeze(1)", "z.squeeze()", "z.squeeze(0)", "z[:, None]", "z[:1].expand(5, *z.shape[1:])",
    "z.expand(24, 37)", "z.expand(4, 6, 37)", "z.repeat(2, *[1] * (z.dim() - 1))", "z.flip(0)", "z.flip(-1)", "z.roll(1, 0)",
    "z.reshape(-1, z.shape[-1])", "z.flatten(0, -2)", "z.transpose(0, -1)", "z.transpose(0, 1)", "z.mT.mT", "z[..., None].squeeze(-1)",
    "z.reshape(-1)", "z.view(-1, 37)", "z.reshape(1, -1, 37)", "z.reshape(2, -1, z.shape[-1])", "z.movedim(-1, 0)", "z.repeat_interleave(2, 0)",
    "torch.cat([z, z])", "torch.cat([z, z[:1]])", "torch.stack([z, -z])", "torch.stack([z, -z], 1)[:, 0]", "z.narrow(0, 0, 1)",
    "z.index_select(0, torch.tensor([0, 0]))", "z.chunk(2)[-1]", "z.diff(dim=0)", "z.unfold(0, 2, 1)[..., 0]", "torch.cat([z, z], -1)",
    "z.as_strided(z.shape, z.stride())", "z.swapaxes(0, 1)", "z.sum(0)", "z.sum(0, keepdim=True)", "z.mean(0)", "z.logsumexp(0)",
)  # fmt: skip

# Losses of logits of any shape; {n} is the number of rows, {c} of classes, {s} the shape of the rows.
LOSSES = (
    *["F.cross_entropy(z.reshape(-1, {c}), (torch.arange({n}) * 7) % {c})", "z.logsumexp(-1).square().mean()"] * 6,
    *["F.cross_entropy(z, y[:{first}] % {c})", "(z.logsumexp(-1) - z[..., 0]).mean()", "z.logsumexp(-1).sum(0).square().sum()"] * 4,
    "F.cross_entropy(z.reshape(-1, {c}), (torch.arange({n}) * 7) % {c})",
    "F.cross_entropy(z.reshape(-1, {c}), (y.repeat(9)[:1] % {c}).expand({n}))",
    "F.cross_entropy(z.reshape(-1, {c}), torch.full(({n},), 3 % {c}), reduction='sum')",
    "F.cross_entropy(z, y[:{first}] % {c})",
    "F.cross_entropy(z, y)", "F.cross_entropy(z, y3)", "F.cross_entropy(z, y[:1])", "F.cross_entropy(z, y[0])",
    "z.logsumexp(-1).square().mean()", "z.logsumexp(-1).sum(0).square().sum()", "z.logsumexp(-1, keepdim=True).square().sum()",
    "z.logsumexp(0).square().mean()", "z.log_softmax(-1)[..., 0].sum()", "-z.log_softmax(-1).mean()",
    "z.log_softmax(-1).gather(-1, torch.zeros(*{s}, 1, dtype=torch.long)).sum()",
    "z.log_softmax(-1).gather(-1, (y[:1] % {c}).expand(*{s}, 1)).mean()",
    "z.log_softmax(-1).gather(-1, torch.full([1] * z.dim(), 2 % {c})).mean()",
    "z.log_softmax(-1).take_along_dim(torch.full([1] * z.dim(), 2 % {c}), -1).mean()",
    "z.log_softmax(-1).take_along_dim(y.reshape(-1, *[1] * (z.dim() - 1)) % {c}, -1).mean()",
    "-(F.one_hot(y[:1] % {c}, {c}) * z.log_softmax(-1)).sum(-1).mean()",
    "-(F.one_hot(y[0] % {c}, {c}) * z.log_softmax(-1)).sum()",
    "-(F.one_hot(y % {c}, {c}) * z.log_softmax(-1)).sum(-1).mean()",
    "-(F.one_hot(y3 % {c}, {c}) * z.log_softmax(-1)).sum(-1).mean()",
    "-(z.log_softmax(-1) * z.new_zeros({c}).index_fill(0, y[:1] % {c}, 1.0)).sum()",
    "(z.logsumexp(-1, keepdim=True) - z).square().mean()", "(z - z.logsumexp(-1, keepdim=True))[..., 1 % {c}].sum()",
    "(z.logsumexp(-1) - z[..., 0]).mean()", "(z.logsumexp(-1) - row[:1]).square().mean()", "(z.logsumexp(-1) * row).sum()",
    "(z.logsumexp(-1)[..., None] * row).sum()", "(z.logsumexp(-1) * weights3).mean()", "(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()",
    "z.log_softmax(-1)[torch.arange({first}), ..., y[:{first}] % {c}].mean()", "z.softmax(-1).amax(-1).log().sum()",
    "F.kl_div(z.log_softmax(-1), soft, reduction='batchmean')", "F.kl_div(z.log_softmax(-1), soft[:1], reduction='sum')",
    "F.nll_loss(z.log_softmax(-1), y)", "F.nll_loss(z.log_softmax(1), y3[:, :1])", "F.cross_entropy(z, soft)", "F.cross_entropy(z, soft[0])",
    "F.cross_entropy(z.transpose(1, -1), y3)", "F.cross_entropy(z.transpose(1, 2), (y[:1] % {c}).expand(z.shape[0], z.shape[1]))",
)  # fmt: skip


def _step(rng: random.Random) -> str:
    if rng.random() < 0.6:
        return f"z = {rng.choice(COMBINE).format(rng.choice(OPERANDS))}"
    return f"z = {rng.choice(SHAPES)}"


def _value(body: str) -> Any:
    text = Text(body)
    return text.functions()[0](*text.inputs())


def programs(seed: int) -> Iterator[Text]:
    rng = random.Random(seed)
    while True:
        body = f"z = {rng.choice(LOGITS)}"
        shape = None
        for _ in range(rng.choice((1, 1, 2, 2, 3))):
            longer = f"{body}\n{_step(rng)}"
            try:
                value = _value(f"{longer}\nreturn z")
            except Exception:  # shapes that do not fit
                continue
            if value.dim() and 0 < value.numel() < 40000:
                body, shape = longer, value.shape
        if shape is None:
            continue
        rows, count = list(shape[:-1]), shape[:-1].numel()
        candidates = [rng.choice(LOSSES) for _ in range(6)]
        for loss in candidates:
            line = loss.format(n=count, c=shape[-1], s=rows, first=shape[0])
            beside = rng.choice(("", "", " + 0.1 * z.logsumexp(-1).mean()", " + 0 * y.sum()"))
            try:
                value = _value(f"{body}\nreturn {line}{beside}")
            except Exception:
                continue
            if torch.is_tensor(value) and value.isfinite().all():
                dynamic = rng.choice((None, None, None, None, True))
                yield Text(f"{body}\nreturn {line}{beside}", grad=rng.random() < 0.9, dynamic=dynamic)
                break
