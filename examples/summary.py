"""What comes out of the two runs: a table, a verdict and a picture."""

from __future__ import annotations

import dataclasses
import math
import statistics
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

MIB = 1 << 20
# Training amplifies rounding, so only early losses can be held to a tolerance that would show a wrong gradient.
EARLY_STEPS = 5
_BEFORE, _AFTER = "#8a8a8a", "#0b62c4"


@dataclasses.dataclass(frozen=True)
class Run:
    """Result of one training run in its own process.

    Attributes:
        losses: one per step.
        resident: bytes of tensors between two steps: parameters and optimizer state, on a GPU also workspaces.
        peak: most bytes of tensors alive at any time of a step, the resident ones included.
        step_ms, step_bytes: memory above the start of one step, over time.
        tokens_per_s: of the median step after compilation and warm-up.
        compile_s: the first step's time less that of a usual step.
        logits_bytes: size of the [N, V] logits in the dtype of the model's head.
        tolerance: how far early losses may be apart in the precision that was used.
        counters: torch._dynamo.utils.counters["lce_inductor"].
        unit: what tokens_per_s counts, where it is something else.
    """

    losses: list[float]
    resident: int
    peak: int
    step_ms: list[float]
    step_bytes: list[int]
    tokens_per_s: float
    compile_s: float
    logits_bytes: int
    tolerance: float
    counters: dict[str, int]
    unit: str = "tokens"

    @property
    def rewritten(self) -> int:
        return self.counters.get("rewritten", 0)


def loss_difference(without: Run, with_pass: Run, steps: int | None = None) -> float:
    """The largest over the first `steps` steps, or over all."""
    pairs = zip(without.losses[:steps], with_pass.losses[:steps], strict=True)
    return max(abs(a - b) for a, b in pairs)


def problems(without: Run, with_pass: Run, falls: bool = True) -> list[str]:
    """Reasons why this was no success; empty if it was one. `falls`: must the losses get smaller?"""
    found = []
    if with_pass.rewritten == 0:
        counted = ", ".join(f"{k}: {v}" for k, v in sorted(with_pass.counters.items())) or "none"
        found.append(
            f"lce_inductor rewrote nothing (its counters: {counted}).\n"
            f"The logits take {with_pass.logits_bytes / MIB:.1f} MiB; heads below min_logits_bytes are left alone "
            "(--min-logits-bytes 0 takes all).\n"
            'TORCH_LOGS="+lce_inductor" shows the reason for each head.'
        )
    for name, run in (("without", without), ("with", with_pass)):
        if not all(map(math.isfinite, run.losses)):
            found.append(f"The loss {name} lce_inductor is not finite.")
            continue
        # Single batches scatter: compare halves.
        half = len(run.losses) // 2
        first, second = statistics.fmean(run.losses[:half]), statistics.fmean(run.losses[half:])
        if falls and second >= first:
            found.append(f"The loss {name} lce_inductor did not fall: mean {first:.4f} early, {second:.4f} late.")
    early = loss_difference(without, with_pass, EARLY_STEPS)
    if early > with_pass.tolerance:
        found.append(
            f"The losses of the first {EARLY_STEPS} steps differ by {early:.1e}, more than {with_pass.tolerance:.0e}."
        )
    return found


def print_table(console: Console, without: Run, with_pass: Run, control: Run | None = None) -> None:
    """Print both runs side by side; `control` is another run without lce_inductor, see train_gpt.py --control."""
    table = Table(title="torch.compile, the same steps twice", title_justify="left")
    table.add_column("")
    for heading in ("without", "with lce_inductor", "difference"):
        table.add_column(heading, justify="right")

    def memory(label: str, a: int, b: int) -> None:
        change = f" ({b / a - 1:+.0%})" if a else ""
        digits = 1 if max(a, b) < 1000 * MIB else 0
        cells = (f"{a / MIB:,.{digits}f}", f"{b / MIB:,.{digits}f}", f"{(b - a) / MIB:+,.{digits}f}")
        table.add_row(label, f"{cells[0]} MiB", f"{cells[1]} MiB", f"{cells[2]} MiB{change}")

    memory("peak memory", without.peak, with_pass.peak)
    memory("  between steps", without.resident, with_pass.resident)
    memory("  added by a step", max(without.step_bytes), max(with_pass.step_bytes))
    a, b = without.tokens_per_s, with_pass.tokens_per_s
    table.add_row(f"{without.unit}/s", f"{a:,.0f}", f"{b:,.0f}", f"{b / a - 1:+.0%}")
    a, b = without.compile_s, with_pass.compile_s
    table.add_row("compile time", f"{a:.1f} s", f"{b:.1f} s", f"{b - a:+.1f} s")
    for label, step in (("first loss", 0), ("last loss", -1)):
        a, b = without.losses[step], with_pass.losses[step]
        table.add_row(label, f"{a:.6f}", f"{b:.6f}", f"{b - a:+.1e}")
    table.add_row("max loss difference", "", "", f"{loss_difference(without, with_pass):.1e}")
    if control is not None:
        table.add_row("  after a 1e-6 nudge", "", "", f"{loss_difference(without, control):.1e}")
    table.add_row("heads rewritten", str(without.rewritten), str(with_pass.rewritten), "")
    console.print(table)


def draw(path: Path, without: Run, with_pass: Run, caption: str) -> None:
    """Write a PNG: both loss curves, and the memory of one step over time."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = range(1, len(without.losses) + 1)
    left.plot(steps, without.losses, color=_BEFORE, linewidth=5, alpha=0.6, label="without")
    left.plot(steps, with_pass.losses, color=_AFTER, linewidth=1.5, label="with lce_inductor")
    difference = loss_difference(without, with_pass)
    left.set(title=f"Loss (largest difference {difference:.1e})", xlabel="step", ylabel="loss")

    highest = 0.0
    for run, color, name in ((without, _BEFORE, "without"), (with_pass, _AFTER, "with lce_inductor")):
        level = [(run.resident + b) / MIB for b in run.step_bytes]
        label = f"{name}: peak {max(level):,.0f} MiB"
        right.plot(run.step_ms, level, drawstyle="steps-post", color=color, linewidth=1.5, label=label)
        highest = max(highest, *level)
        right.fill_between(run.step_ms, level, step="post", color=color, alpha=0.2)
    high = without.resident / MIB > 0.1 * highest  # enough room for the text below the line
    right.axhline(without.resident / MIB, color="black", linewidth=0.8, linestyle=":")
    right.annotate(
        "between steps",
        (1, without.resident / MIB),
        xycoords=("axes fraction", "data"),
        xytext=(-4, -3 if high else 3),
        textcoords="offset points",
        ha="right",
        va="top" if high else "bottom",
        fontsize=8,
    )
    right.set(title="Memory of tensors during one step", xlabel="host time in the step (ms)", ylabel="MiB")
    right.set_ylim(0, 1.25 * highest)  # room for the legend above the curves
    right.set_xlim(left=0)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(loc="best" if axes is left else "upper right")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(caption, fontsize=10)
    figure.savefig(path, dpi=130)
