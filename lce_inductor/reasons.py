"""Every reason for leaving a head alone: code, explanation, hint. docs/reasons.md lists the same codes."""

from __future__ import annotations

from typing import Any, NamedTuple

NOWHERE = "torch's own code, or code without a file"  # the line of what exec() made, or a module of torch


class Reason(NamedTuple):
    """A static row of the table below."""

    code: str
    explanation: str
    hint: str


class Refusal(NamedTuple):
    """Why one head stays as it is. `node` is where recognition stopped; formatted only when somebody reads it."""

    reason: Reason
    node: Any = None
    detail: str = ""


_ROWS = (
    Reason(
        "escape",
        "an operation without a rule reads the logits, so they have to exist",
        "keep the logits out of that operation, or compute it from the loss's own inputs",
    ),
    Reason(
        "crossing",
        "several rows of logits are read at once, or a slice of one: a softmax over tokens, statistics of a batch, "
        "rows in another order",
        "none for a loss that needs all logits at once; a check or a metric over all of them can go row by row first: "
        "logits.isfinite().all(-1).all()",
    ),
    Reason(
        "one-row",
        "there is a single row of logits, or a single one of many is read: the work is cut into rows",
        "none for a single row; of many, take the one of the hidden states, before the head",
    ),
    Reason(
        "product",
        "a matrix product of the forward reads the logits",
        "none: what comes out of it is another layer's input",
    ),
    Reason(
        "collective",
        "processes exchange the logits, or values of rows that come back to the logits otherwise than in a softmax "
        "over the classes of all processes",
        "split the head by classes and leave its logits so: ColwiseParallel(output_layouts=Shard(-1), "
        "use_local_output=False), and loss_parallel() around the loss",
    ),
    Reason(
        "collective-order",
        "the rewrite would change the order of collectives, in which all processes must agree",
        "compute the labels, and what else the loss reads, before the first collective that reads the logits",
    ),
    Reason(
        "random",
        "random numbers of the size of the logits are drawn (dropout, Gumbel noise)",
        "leave dropout out of the logits (before the head it does no harm); noise can be an argument of the function",
    ),
    Reason(
        "returned",
        "the logits, or a value for each class, are returned, so they have to exist",
        "return them only where they are needed; or the logits alone, which returned_logits='defer' computes when read",
    ),
    Reason(
        "rows-differ",
        "the labels may have another number of rows than the logits",
        "give logits and labels the same first dimensions",
    ),
    Reason(
        "no-loss",
        "nothing in this graph reduces the logits to a loss",
        "compile the head and the loss in one function; a graph break between them separates them",
    ),
    Reason(
        "too-small",
        "the logits, of all trained heads of the weight together, are smaller than min_logits_bytes",
        "install(min_logits_bytes=0) rewrites heads of every size",
    ),
    Reason(
        "little-saved",
        "chunks of the only head, or of all heads of the only weight, would save less than 192 MiB of torch.compile's "
        "memory, and cost it time; or those of several weights would need more than it",
        "install(min_logits_bytes=0) or chunk_tokens=... rewrites it all the same",
    ),
    Reason(
        "device",
        "heads are computed on CPUs, on NVIDIA GPUs, and on AMD's where torch has 16-bit products with sums in fp32; "
        "elsewhere this was never tried",
        "none for a device; in fp16, torch.backends.cuda.matmul.allow_fp16_accumulation = False before compiling",
    ),
    Reason(
        "returned-loss-free",
        "the logits are returned and no loss in this graph reads them",
        "none if the caller wants the logits; a loss that reads them has to be compiled in one function with the head, "
        "or the head put under lce_inductor.defer(head)",
    ),
    Reason(
        "no-head",
        "the loss reads logits that no matrix product of this graph computes",
        "compile the head and the loss in one function; logits that are made in it have to come from a matrix product "
        "(F.linear)",
    ),
    Reason(
        "foreign-product",
        "the logits are made by an operation that is not torch's plain matrix product: a convolution, a batched, "
        "scaled (fp8) or quantized product, a custom op",
        "compute them by F.linear: a convolution of kernel size 1 is one, with the channels last; for torch.func.vmap "
        "or torch.bmm, one for each weight in a loop; leave the head out of fp8 and quantization",
    ),
    Reason(
        "graph-break",
        "the head and its loss are not in one graph: torch.compile broke the graph between them",
        "take what breaks the graph out from between them, or behind `if not torch.compiler.is_compiling()`; or put "
        "the head under lce_inductor.defer(head)",
    ),
    Reason(
        "loss-outside",
        "the compiled function returns logits that need a gradient; their loss is computed outside it",
        "compile the function that calls the model and the loss, or put the head under lce_inductor.defer(head)",
    ),
    Reason(
        "not-installed",
        "the passes are not in Inductor's hooks, else this head would be rewritten",
        "call lce_inductor.install() before the first call of the compiled function, in the thread that compiles",
    ),
    Reason(
        "compiled-before",
        "a call runs code that was compiled before install(), or in a thread or at a time without the passes; "
        "compiled anew, this head would be rewritten",
        "call lce_inductor.install() before the first call of the compiled function, in the thread that makes it; "
        "torch._dynamo.reset() makes the next call compile anew",
    ),
    Reason(
        "recompile-limit",
        "torch.compile has compiled this function as often as its limit allows: a call with these arguments runs in "
        "eager mode (with fullgraph=True it fails)",
        "mark the sizes that change as dynamic (torch.compile(fn, dynamic=True)), or raise "
        "torch._dynamo.config.recompile_limit before it is reached",
    ),
    Reason(
        "hooks-replaced",
        "options= of this torch.compile, or somebody else, replaces the hook that holds the pass, else this head would "
        "be rewritten",
        "set your own pass in torch._inductor.config before lce_inductor.install(), and leave the hook out of options=",
    ),
    Reason(
        "other-backend",
        "this torch.compile uses another backend than Inductor, else this head would be rewritten",
        "leave backend= at its default, 'inductor'",
    ),
    Reason(
        "ahead-of-time",
        "the graph is compiled ahead of time, for a process that need not have lce_inductor's ops",
        "none: use torch.compile where the logits should not exist",
    ),
    Reason(
        "internal-error",
        "a pass raised an exception; the graph was left as it was",
        "report it with TORCH_LOGS='+lce_inductor'",
    ),
)

REASONS: dict[str, Reason] = {row.code: row for row in _ROWS}


def refuse(code: str, node: Any = None, detail: str = "") -> Refusal:
    """A Refusal with the table's row for `code` (KeyError for a code that is not in the table)."""
    return Refusal(REASONS[code], node, detail)
