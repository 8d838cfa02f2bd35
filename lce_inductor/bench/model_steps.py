"""One row of the table of whole models: a model trained in one way, in a process of its own."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import torch
from torch import Tensor

from . import processes, torchtitan_steps
from .arguments import kind
from .implementations import IMPLEMENTATIONS, NotApplied
from .measure import current_device, failure, finish, peak_added, timed_ms
from .processes import OK, OUT_OF_MEMORY, repeated, write_result

SAMPLES = 8192  # elements of a gradient that rows are compared by
IGNORED = -100
WARMUP_STEPS = 2  # after the first, which compiles


@dataclasses.dataclass(frozen=True)
class Model:
    """A transformers model type, its configuration, sequences x tokens of a step, and a weight of its first layer.

    package: another one than transformers, whose own model and loss it is. attention: what it has of its own.
    """

    kind: str
    sizes: dict[str, Any]
    batch: int
    length: int
    layer: str
    small: dict[str, Any]
    package: str = "transformers"
    attention: str = "sdpa"

    @property
    def missing(self) -> str:
        """The package, if it is not installed."""
        return "" if importlib.util.find_spec(self.package) else self.package


_GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "vocab_size": 512}  # fmt: skip
_LLAMA = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
          "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 4096}  # fmt: skip
_QWEN = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
         "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 2048}  # fmt: skip
MODELS = {
    "gpt2": Model(
        "gpt2", _GPT2 | {"vocab_size": 50257, "n_positions": 1024}, 32, 1024, "transformer.h.0.mlp.c_fc.weight",
        _GPT2 | {"vocab_size": 503, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2},
    ),
    "llama-1b": Model("llama", _LLAMA, 4, 4096, "model.layers.0.mlp.up_proj.weight", _TINY | {"head_dim": 16}),
    "qwen2-0.5b": Model("qwen2", _QWEN, 8, 2048, "model.layers.0.mlp.up_proj.weight", _TINY),
    "torchtitan-1b": Model(
        "llama3", {"flavor": "1B"}, 4, 4096, "layers.0.feed_forward.w1.weight", {"flavor": "debugmodel", "layers": 2},
        "torchtitan", "flex",
    ),
}  # fmt: skip
_OF_TRANSFORMERS = tuple(name for name, model in MODELS.items() if model.package == "transformers")
SMALL_BATCH, SMALL_LENGTH = 4, 32
# sdpa: transformers' own; traced by torch.compile it is given an explicit causal mask. causal: the same without a mask.
# torchtitan's own is flex attention, wherever the first is asked for.
ATTENTION = ("sdpa", "causal")


@dataclasses.dataclass(frozen=True)
class Job:
    """What to measure. `lock` is a file that the process holds while it takes steps, or None. `ignored`: the share of
    the labels that the loss leaves out. `attention`: see ATTENTION."""

    model: str
    implementation: str
    batch: int
    length: int
    device: str
    small: bool = False
    reps: int = 8
    largest: bool = False
    lock: str | None = None
    attention: str = "sdpa"
    ignored: float = 0.0

    @property
    def kind_of_attention(self) -> str:
        """The model's own, if it was not asked for another, and has a backward on this device."""
        if self.attention != "sdpa":
            return self.attention
        own = MODELS[self.model].attention
        return "causal" if own == "flex" and self.device == "cpu" else own


@dataclasses.dataclass(frozen=True)
class Row:
    """What came out; None where it was not measured.

    Attributes:
        norms, samples: of the gradients of the embedding and of a weight of the first layer.
        first_s: seconds of the first step, compilation included, without the wait for the lock.
        err_*: relative differences to another row, see `judged`.
    """

    job: Job
    status: str
    detail: str = ""
    ms: float | None = None
    added_bytes: int | None = None
    weight_bytes: int | None = None
    loss: float | None = None
    norms: list[float] | None = None
    samples: list[list[float]] | None = None
    first_s: float | None = None
    largest_batch: int | None = None
    too_large_batch: int | None = None
    err_loss: float | None = None
    err_norm_head: float | None = None
    err_norm_layer: float | None = None
    err_head: float | None = None
    err_layer: float | None = None

    @property
    def tokens_per_s(self) -> float | None:
        return self.job.batch * self.job.length / self.ms * 1000 if self.ms else None


@dataclasses.dataclass(frozen=True)
class Way:
    """How a model is trained: `prepare` changes this process before the model is built.

    `like` is the entry of implementations.py that knows what has to be installed and whether a pass did its work.
    """

    like: str
    prepare: Callable[[Job], None] = lambda job: None
    compiled: bool = True
    models: tuple[str, ...] = tuple(MODELS)

    def obstacle(self, device: str) -> str:
        return IMPLEMENTATIONS[self.like].obstacle(kind(device))


def _install(job: Job) -> None:
    from lce_inductor import install

    install(**({"min_logits_bytes": 0} if job.small else {}))


def _chunk(job: Job) -> None:
    import torch._inductor.config

    settings = torch._inductor.config.auto_chunker
    settings.enable, settings.num_chunk, settings.amplify_ratio_threshold = True, 8, 2


def _liger(**settings: bool) -> Callable[[Job], None]:
    def patch(job: Job) -> None:
        import liger_kernel.transformers as liger

        getattr(liger, f"apply_liger_kernel_to_{MODELS[job.model].kind}")(**settings)

    return patch


CHUNKED = "torchtitan-chunked"  # the loss that torchtitan trains its Llama by: head and loss, a chunk at a time
_LIGER: dict[str, Any] = {"like": "liger", "compiled": False, "models": ("llama-1b", "qwen2-0.5b")}
WAYS = {
    "eager": Way("eager", compiled=False),
    "torch.compile": Way("torch.compile"),
    "lce_inductor": Way("lce_inductor", _install),
    "liger": Way(prepare=_liger(), **_LIGER),
    "liger-head": Way(prepare=_liger(rope=False, rms_norm=False, swiglu=False), **_LIGER),  # its loss alone
    "auto_chunker": Way("auto_chunker", _chunk, models=_OF_TRANSFORMERS),
    CHUNKED: Way("torch.compile", models=("torchtitan-1b",)),
}


class Turn:
    """Held from the first step on until the process ends: at any time one process has the GPU to itself."""

    def __init__(self, path: str | None) -> None:
        self.path, self.waited_s = path, 0.0
        self.file: TextIO | None = None

    def take(self, *_: object) -> None:
        if self.path is None or self.file is not None:
            return
        import fcntl

        start = time.perf_counter()
        self.file = open(self.path, "a")  # noqa: SIM115  # the lock ends with it
        fcntl.flock(self.file, fcntl.LOCK_EX)
        self.waited_s = time.perf_counter() - start


def register_causal_attention() -> None:
    """attn_implementation="causal": sdpa, which is causal where it is given no mask. For sequences without padding."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("causal", sdpa_attention_forward)
    AttentionMaskInterface.register("causal", lambda *args, **kwargs: None)


@dataclasses.dataclass(frozen=True)
class Training:
    """A model, and how it is trained: `loss(*batch(tokens, labels))`, tokens and labels [B, T]."""

    model: Any
    head: Tensor
    batch: Callable[[Tensor, Tensor], tuple[Any, ...]]
    loss: Callable[..., Tensor]


def training(job: Job, device: torch.device) -> Training:
    """The same weights for every implementation."""
    compiled, model = WAYS[job.implementation].compiled, build(job, device)
    if MODELS[job.model].package == "torchtitan":
        if job.implementation == "lce_inductor":
            from lce_inductor import defer

            defer(model.lm_head)
        masks = job.kind_of_attention != "causal"
        batch, loss = torchtitan_steps.prepare(model, compiled, job.implementation == CHUNKED, masks)
        return Training(model, model.lm_head.weight, batch, loss)
    run = torch.compile(model, dynamic=False) if compiled else model

    def loss_of(tokens: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = run(input_ids=tokens, labels=labels).loss
        return found

    return Training(model, model.get_output_embeddings().weight, lambda *given: given, loss_of)


def build(job: Job, device: torch.device) -> Any:
    """The model alone."""
    spec = MODELS[job.model]
    sizes = spec.small if job.small else spec.sizes
    if spec.package == "torchtitan":
        return torchtitan_steps.build(sizes, device, job.kind_of_attention == "causal")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(spec.kind, use_cache=False, tie_word_embeddings=True, **sizes)
    if job.attention == "causal":
        register_causal_attention()
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=job.attention)
    model.loss_type = "ForCausalLM"  # GPT-2's class is not named so, and what transformers does then breaks the graph
    return model.to(device).train()


def measure(job: Job, save: Callable[[Row], None]) -> None:
    """Measure in this process and save the row, twice if its largest batch is looked for."""
    try:
        _measure(job, save)
    except Exception as error:
        save(Row(job, *failure(error)))


def _measure(job: Job, save: Callable[[Row], None]) -> None:
    device, way = current_device(job.device), WAYS[job.implementation]
    way.prepare(job)
    trained = training(job, device)
    model, head = trained.model, trained.head
    layer = model.get_parameter(MODELS[job.model].layer)
    random = torch.Generator(device).manual_seed(1)

    def step_of(batch: int) -> Callable[[], Tensor]:
        tokens = torch.randint(len(head), (batch, job.length), device=device, generator=random)
        left_out = torch.rand(tokens.shape, device=device, generator=random) < job.ignored
        given = trained.batch(tokens, tokens.masked_fill(left_out, IGNORED))

        def step() -> Tensor:
            loss = trained.loss(*given)
            loss.backward()
            return loss.detach()

        return step

    turn, start, step = Turn(job.lock), time.perf_counter(), step_of(job.batch)
    if way.compiled:
        # All is compiled before the first step runs: waiting here keeps the compilation out of the turn.
        compilations = torch._dynamo.callback.callback_handler
        compilations.register_end_callback(turn.take)
        loss = step().item()
        compilations.remove_end_callback(turn.take)
    turn.take()
    if not way.compiled:
        loss = step().item()
    first_s = time.perf_counter() - start - turn.waited_s
    idle = "" if job.implementation.startswith("liger") else IMPLEMENTATIONS[way.like].idle()
    if way.like == "liger" and not type(model).forward.__module__.startswith("liger_kernel"):
        idle = "patched nothing"
    if idle:
        raise NotApplied(idle)
    grads = [head.grad, layer.grad]
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32).item() for g in grads]
    # An odd stride meets every column.
    samples = [g.flatten()[:: g.numel() // SAMPLES | 1][:SAMPLES].tolist() for g in grads]
    del grads

    def clear() -> None:
        model.zero_grad(set_to_none=True)

    for _ in range(WARMUP_STEPS):
        clear()
        step()
    added = peak_added(step, clear, device)

    def timed() -> float:
        clear()
        return timed_ms(step, device)

    times = repeated(timed, job.reps, clear)
    clear()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    row = Row(job, OK, "", statistics.median(times), added, weights, loss, norms, samples, first_s)
    save(row)
    if not job.largest:
        return

    def peak_of(batch: int) -> int | None:
        try:
            step = step_of(batch)
            step()
            return peak_added(step, clear, device)
        except Exception as error:
            if failure(error)[0] != OUT_OF_MEMORY:
                raise
        finally:
            clear()
        return None

    gc.collect()
    torch.cuda.empty_cache()
    finish(device)
    free, tries = torch.cuda.mem_get_info(device)[0], 3 if way.compiled else 8
    try:
        best, failed = largest_batch(peak_of, {job.batch: added}, free, weights // 2, tries)
        save(dataclasses.replace(row, largest_batch=best, too_large_batch=failed))
    except Exception as error:
        save(dataclasses.replace(row, detail=f"largest batch: {failure(error)[1]}"))


def largest_batch(
    peak_of: Callable[[int], int | None], peaks: dict[int, int], free: int, fixed: int, tries: int
) -> tuple[int, int | None]:
    """Try what a straight line through the peaks says will just fit, and what is next to it.

    Args:
        peak_of: batch -> bytes that its step adds, None if it is out of memory.
        peaks: batches that ran, and their bytes; added to.
        free: bytes that there are.
        fixed: guess of the bytes of a step that do not depend on the batch, while one peak is known.
        tries: calls of peak_of, at most.

    Returns:
        The largest that ran, and the smallest that did not (None if none was tried).
    """
    failed: int | None = None
    for _ in range(tries):
        (low, at_low), (best, at_best) = [(0, fixed), *sorted(peaks.items())][-2:]
        slope = max(1.0, (at_best - at_low) / (best - low))
        batch = max(best + 1, best + int((free - at_best) / slope))
        if failed is not None:
            batch = min(batch, failed - 1)
        if batch <= best:
            break
        peak = peak_of(batch)
        if peak is None:
            failed = batch
        else:
            peaks[batch] = peak
    return max(peaks), failed


if __name__ == "__main__":
    processes.main(sys.argv[1:], lambda job, result: measure(Job(**job), lambda row: write_result(result, row)))
