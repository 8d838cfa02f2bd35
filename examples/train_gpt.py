"""Train a GPT on the standard library's sources, without and with lce_inductor, and compare.

    python examples/train_gpt.py              about two minutes on two CPU cores; GPT-2 small on a CUDA device
    python examples/train_gpt.py --help

Both runs take the same steps on the same batches from the same weights, each in a fresh process with an empty
compile cache. The model (gpt.py) is plain PyTorch; the only difference is install(), see `train`.
Exit code 1: the second run rewrote nothing, a loss did not fall, or a run failed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

try:
    import summary
    import torch
    from compare import StepClock, prepare_tokens
    from data import Batches
    from gpt import GPT, GPTConfig
    from options import Sizes, parse
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from step_memory import record_step, resident_bytes
except ModuleNotFoundError as error:
    sys.exit(f'{error.name} is missing: pip install -e ".[examples]"')

WARMUP_STEPS = 2  # the first compiles; the second still sees cold allocators
NUDGE = 1e-6  # relative change of the first weights in the control run: a few units in the last place
SHOW_LOSS_EVERY = 5  # reading the loss waits for the GPU


@dataclasses.dataclass(frozen=True)
class Job:
    """What one training process needs to know."""

    sizes: Sizes
    device: str
    seed: int
    tokens: str
    settings: dict[str, int]
    install: bool = False
    nudge: bool = False

    @property
    def name(self) -> str:
        return "with lce_inductor" if self.install else "without, nudged" if self.nudge else "without"

    @classmethod
    def from_json(cls, text: str) -> Job:
        fields = json.loads(text)
        return cls(**{**fields, "sizes": Sizes(**fields["sizes"])})


def train(job: Job, console: Console) -> summary.Run:
    """One training run. Sizes, seed and data are the same for all; `job.install` is the difference."""
    sizes, device = job.sizes, torch.device(job.device)
    on_gpu = device.type == "cuda"
    batches = Batches(Path(job.tokens), sizes.batch, sizes.block, job.seed)
    torch.manual_seed(job.seed)
    if on_gpu:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    config = GPTConfig(batches.vocab_size, sizes.block, sizes.layers, sizes.heads, sizes.embd)
    model = GPT(config).to(device)
    if job.nudge:
        with torch.no_grad():
            model.lm_head.weight.mul_(1 + NUDGE)

    if job.install:
        import lce_inductor

        lce_inductor.install(**job.settings)
    compiled = torch.compile(model)

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=sizes.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    autocast = torch.autocast("cuda", torch.bfloat16) if bf16 else contextlib.nullcontext()
    losses: list[torch.Tensor] = []
    rate_warmup = max(1, sizes.steps // 8)

    def step() -> None:
        rate = sizes.learning_rate * min(1.0, (len(losses) + 1) / rate_warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        idx, targets = batches.next(device)
        with autocast:
            loss = compiled(idx, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    def finish() -> float:
        if on_gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[loss]}"), console=console) as progress:
        task = progress.add_task(f"{job.name:<17}", total=sizes.steps, loss="compiling")

        def advance() -> None:
            progress.update(task, advance=1)
            if len(losses) in (1, sizes.steps) or len(losses) % SHOW_LOSS_EVERY == 0:
                progress.update(task, loss=f"loss {losses[-1].item():.3f}")

        start = finish()
        step()
        first_s = finish() - start
        advance()
        for _ in range(WARMUP_STEPS - 1):
            step()
            advance()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        clock = StepClock(device)
        for _ in range(sizes.steps - WARMUP_STEPS - 1):
            step()
            clock.mark()
            advance()
        finish()
        usual_s = clock.median_s()
        if on_gpu:
            resident, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
            timeline = record_step(step, device)
        else:
            # The CPU's allocator keeps no statistics: add up the tensors and the profiler's events.
            state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, torch.Tensor)]
            resident = resident_bytes([*model.parameters(), *model.buffers(), *state], device)
            timeline = record_step(step, device)
            peak = resident + timeline.peak
        advance()

    counters = torch._dynamo.utils.counters["lce_inductor"]
    tokens = sizes.batch * sizes.block
    return summary.Run(
        losses=torch.stack(losses).tolist(),
        resident=resident,
        peak=peak,
        step_ms=timeline.milliseconds,
        step_bytes=timeline.bytes,
        tokens_per_s=tokens / usual_s,
        compile_s=max(0.0, first_s - usual_s),
        logits_bytes=tokens * batches.vocab_size * (2 if bf16 else 4),
        tolerance=2e-2 if bf16 else 1e-3,
        counters={key: int(value) for key, value in counters.items()},
    )


def run_in_fresh_process(job: Job) -> summary.Run:
    """Run `train` in a new process with an empty compile cache.

    Else the second run would find the first one's compiled code and memory pools, and its compile time and
    peak would not be its own.
    """
    with tempfile.TemporaryDirectory(prefix="train_gpt_") as folder:
        result = Path(folder) / "run.json"
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "cache")}
        environment.pop("TRITON_CACHE_DIR", None)  # unset, it lies inside Inductor's
        environment.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own start and stop messages
        command = [sys.executable, __file__, "--job", json.dumps(dataclasses.asdict(job)), str(result)]
        code = subprocess.run(command, env=environment).returncode
        if code != 0:
            sys.exit(f"The run {job.name!r} ended with code {code}. Out of memory? Then try a smaller --batch.")
        return summary.Run(**json.loads(result.read_text()))


def main(argv: list[str]) -> int:
    console = Console(highlight=False)
    if argv[:1] == ["--job"]:
        run = train(Job.from_json(argv[1]), console)
        Path(argv[2]).write_text(json.dumps(dataclasses.asdict(run)))
        return 0

    options = parse(argv)
    if importlib.util.find_spec("lce_inductor") is None:
        sys.exit('lce_inductor is not installed: pip install -e ".[examples]"')
    tokens = prepare_tokens(options, console)
    sizes = options.sizes
    try:
        vocabulary = Batches(tokens, sizes.batch, sizes.block, options.seed).vocab_size
    except ValueError as error:
        sys.exit(f"train_gpt.py: error: {error}")
    on_gpu = options.device.startswith("cuda")
    machine = torch.cuda.get_device_name(options.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    caption = (
        f"GPT, {sizes.layers} layers of width {sizes.embd}, vocabulary {vocabulary:,}, "
        f"{sizes.batch} x {sizes.block} tokens per step; {machine}; torch {torch.__version__}"
    )
    console.print(caption, soft_wrap=True)

    settings = {} if options.min_logits_bytes is None else {"min_logits_bytes": options.min_logits_bytes}
    job = Job(sizes, options.device, options.seed, str(tokens), settings)
    without = run_in_fresh_process(job)
    with_pass = run_in_fresh_process(dataclasses.replace(job, install=True))
    control = run_in_fresh_process(dataclasses.replace(job, nudge=True)) if options.control else None

    summary.print_table(console, without, with_pass, control)
    if options.json is not None:
        runs = {"without": without, "with": with_pass, "control": control}
        options.json.write_text(json.dumps({name: dataclasses.asdict(run) for name, run in runs.items() if run}))
    summary.draw(options.out, without, with_pass, caption)
    console.print(f"picture: {options.out}", soft_wrap=True)
    found = summary.problems(without, with_pass)
    for problem in found:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
