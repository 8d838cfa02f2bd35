"""Runs a case compiled, without code generation, and compares it with eager.

Code generation for the CPU costs 5 to 15 seconds a graph and says nothing about the passes. So the backend here runs
everything that Inductor runs up to and including its post-grad passes, and then interprets the two graphs. That takes
about 0.2 s, and the interpreter sees every tensor that the graphs make, at its real size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch import Tensor
from torch._dynamo.utils import counters, detect_fake_mode
from torch._functorch.aot_autograd import aot_function, aot_module, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.compile_fx import _recursive_post_grad_passes, compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch._inductor.fx_utils import get_node_storage
from torch._inductor.virtualized import V
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .registry import Case


@dataclasses.dataclass
class GraphRecord:
    """One compiled graph: which half, and the largest tensor that it made when it ran."""

    kind: str
    text: str
    largest: int = 0
    largest_node: str = ""

    def saw(self, value: Any, node: str, given: Container[int] = ()) -> None:
        """given: addresses of storages that were there before, as those of inputs; a view of one holds nothing new."""
        for tensor in tree_leaves(value):
            # The storage, not numel(): an expanded scalar holds one element, a view of logits holds the logits.
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                held = storage.nbytes() // tensor.element_size()
                if held > self.largest and storage.data_ptr() not in given:
                    self.largest, self.largest_node = held, node


@dataclasses.dataclass
class Run:
    """What one run of a case gave."""

    outputs: list[Tensor]
    grads: dict[str, Tensor | None]
    inputs: list[Tensor]
    graphs: list[GraphRecord] = dataclasses.field(default_factory=list)
    counts: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def largest(self) -> GraphRecord:
        return max(self.graphs, key=lambda g: g.largest)

    def results(self) -> dict[str, Tensor | None]:
        """Outputs, gradients and what the run left in its inputs, by name."""
        return (
            {f"output {i}": t for i, t in enumerate(self.outputs)}
            | {f"gradient of {k}": g for k, g in self.grads.items()}
            | {f"input {i} afterwards": t for i, t in enumerate(self.inputs)}
        )


class _Watcher(torch.fx.Interpreter):
    """Interprets a graph and notes the size of what its nodes make (not of its inputs)."""

    def __init__(self, gm: torch.fx.GraphModule, record: GraphRecord) -> None:
        super().__init__(gm)
        self.record = record
        self.given: set[int] = set()

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if n.op in ("call_function", "call_method", "call_module"):
            self.record.saw(result, f"{n.name} = {n.target}", self.given)
        elif n.op == "placeholder" and isinstance(result, Tensor) and result.layout == torch.strided:
            self.given.add(result.untyped_storage().data_ptr())
        return result


def _no_view(t: Tensor) -> Tensor:
    """The same memory. What Inductor's code returns is no view to autograd: others may write to it."""
    if not t._is_view() or type(t) is not Tensor:
        return t
    return t.new_empty(0).set_(t.untyped_storage(), t.storage_offset(), t.shape, t.stride())


def no_codegen_backend(records: list[GraphRecord]) -> Callable[..., Any]:
    """A torch.compile backend: all of Inductor's graph passes, no code generation."""

    def inner_compile(
        gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any
    ) -> Callable[[list[Any]], Any]:
        is_inference = bool(kwargs.get("is_inference"))
        with V.set_fake_mode(detect_fake_mode(example_inputs)), torch.no_grad():
            view_to_reshape(gm)
            _recursive_post_grad_passes(gm, is_inference=is_inference)
        kind = "backward" if kwargs.get("is_backward") else "inference" if is_inference else "forward"
        record = GraphRecord(kind, str(gm.graph))
        records.append(record)

        def run(args: list[Any]) -> Any:
            taken = list(args)
            args.clear()
            with torch.no_grad():
                out = _Watcher(gm, record).run(*taken, enable_io_processing=False)
            return tree_map_only(Tensor, _no_view, out)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        return compile_fx(gm, example_inputs, inner_compile=inner_compile)

    return backend


class _PostGradSizes:
    """A post-grad hook that notes the sizes in a graph that is going to be compiled for real."""

    def __init__(self, records: list[GraphRecord]) -> None:
        self.records = records

    def __call__(self, graph: torch.fx.Graph) -> None:
        record = GraphRecord("inductor", str(graph))
        given = {get_node_storage(node) for node in graph.find_nodes(op="placeholder")}
        for node in graph.nodes:
            if node.op not in ("placeholder", "output", "get_attr") and get_node_storage(node) not in (given - {None}):
                for value in tree_leaves(node.meta.get("val")):
                    if isinstance(value, Tensor):
                        # An expanded dimension (stride 0) takes no memory.
                        sizes = [s for s, stride in zip(value.shape, value.stride(), strict=True) if stride != 0]
                        numel = math.prod(s if isinstance(s, int) else s.node.hint for s in sizes)
                        if numel > record.largest:
                            record.largest, record.largest_node = numel, f"{node.name} = {node.target}"
        self.records.append(record)


@contextlib.contextmanager
def installed(package: Any, case: Case | None = None, **settings: Any) -> Iterator[None]:
    """Install the package (None: do nothing) for one run, with every threshold off."""
    if package is None:
        yield
        return
    package.install(**{"min_logits_bytes": 0, **(case.config if case else {}), **settings})
    try:
        yield
    finally:
        package.uninstall()


def compiled_run(
    case: Case,
    dtype: torch.dtype,
    *,
    package: Any = None,
    dynamic: bool = False,
    grad: bool = True,
    codegen: bool = False,
    grow: Sequence[int] = (0,),
) -> list[Run]:
    """Compile a case once and run it on inputs of each size of `grow`."""
    records: list[GraphRecord] = []
    torch._dynamo.reset()
    counters.clear()
    backend: Any = "inductor" if codegen else no_codegen_backend(records)
    patches: dict[str, Any] = {"fx_graph_cache": False}
    if codegen:
        patches["post_grad_custom_post_pass"] = _PostGradSizes(records)
    runs = []
    with (
        inductor_config.patch(patches),
        functorch_config.patch(enable_autograd_cache=False),
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=case.unbacked),
        installed(package, case),
    ):
        compiled = None
        for size in grow:
            fn, args, leaves = case.build(dtype, grow=size)
            if compiled is None or isinstance(fn, torch.nn.Module):
                compiled = torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=case.fullgraph)
            run = differentiate(case, compiled, args, leaves, grad)
            run.graphs = list(records)
            run.counts = Counter(counters["lce_inductor"])
            runs.append(run)
    return runs


def eager_run(
    case: Case, dtype: torch.dtype, *, stored: torch.dtype | None = None, grad: bool = True, grow: int = 0
) -> Run:
    """Run a case as it stands."""
    fn, args, leaves = case.build(dtype, stored, grow)
    return differentiate(case, fn, args, leaves, grad)


def reference_run(case: Case, dtype: torch.dtype, *, grad: bool = True, grow: int = 0) -> tuple[Run, torch.dtype]:
    """Run a case in fp64 throughout on values rounded to `dtype`; also the narrowest dtype that it computes in."""
    with InDouble() as mode:
        run = eager_run(case, dtype, stored=torch.float64, grad=grad, grow=grow)
    return run, min((dtype, *mode.narrowed), key=lambda d: -torch.finfo(d).eps)


def differentiate(case: Case, fn: Callable[..., Any], args: list[Any], leaves: dict[str, Tensor], grad: bool) -> Run:
    """Call `fn`; under grad, send fixed random cotangents into its outputs."""
    with torch.set_grad_enabled(grad):
        outputs = [t for t in tree_leaves(fn(*args)) if isinstance(t, Tensor)]
    grads: dict[str, Tensor | None] = {}
    if grad:
        chosen = {"all": outputs, "first": outputs[:1], "second": outputs[1:2], "none": []}[case.backward]
        roots = [t for t in chosen if t.requires_grad]
        generator = torch.Generator().manual_seed(3)
        cotangents = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in roots]
        if roots and leaves:
            found = torch.autograd.grad(roots, list(leaves.values()), cotangents, allow_unused=True)
            grads = dict(zip(leaves, found, strict=True))
    return Run([t.detach() for t in outputs], grads, [a.detach() for a in args if isinstance(a, Tensor)])


_NARROW = (torch.float32, torch.bfloat16, torch.float16)
_CASTS = {Tensor.float: torch.float32, Tensor.bfloat16: torch.bfloat16, Tensor.half: torch.float16}


class InDouble(TorchFunctionMode):
    """Turns every cast to a narrower floating dtype into a cast to fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.narrowed: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        narrow = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype) and a in _NARROW]
        if func in _CASTS:
            narrow = [_CASTS[func]]
            func = Tensor.double
        if narrow:
            if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
                self.narrowed.update(narrow)
            args = tuple(torch.float64 if isinstance(a, torch.dtype) and a in _NARROW else a for a in args)
            kwargs = {k: torch.float64 if isinstance(a, torch.dtype) and a in _NARROW else a
                      for k, a in kwargs.items()}  # fmt: skip
        return func(*args, **kwargs)


def check_close(case: Case, ours: Run, eager: Run, reference: Run, narrowest: torch.dtype) -> None:
    """Errors against fp64 at most 1.25 times eager's, plus a floor; None, dtype and shape as eager has them.

    The floor is what two correct computations may differ by through the order of their roundings alone. Let u be the
    unit roundoff of the narrowest dtype in use and a that of the accumulator (fp32, or fp64 where all is fp64). A
    result is stored with one rounding, at most u relative. It comes from sums of at most N * V terms, whose errors
    add up like a random walk: a * sqrt(N * V) relative to the result. Errors are 2-norms over a whole tensor, since
    the maximum over few elements says more about luck than about the method.
    """
    unit = torch.finfo(narrowest).eps / 2
    accumulator = torch.finfo(torch.float64 if narrowest == torch.float64 else torch.float32).eps / 2
    floor = unit + accumulator * math.sqrt(case.dims.B * case.dims.T * case.dims.V)
    theirs, exact = eager.results(), reference.results()
    problems = []
    for name, value in ours.results().items():
        other, ref = theirs[name], exact[name]
        if value is None or other is None or ref is None:
            if not (value is None and other is None):
                problems.append(f"{name}: {'None' if value is None else 'a tensor'} where eager has the opposite")
            continue
        if (value.dtype, value.shape) != (other.dtype, other.shape):
            problems.append(f"{name}: {value.dtype} {tuple(value.shape)}, eager {other.dtype} {tuple(other.shape)}")
            continue
        if not value.dtype.is_floating_point:
            if not torch.equal(value, other):
                problems.append(f"{name}: {value.tolist()}, eager {other.tolist()}")
            continue
        error, allowed = _error(value, ref), 1.25 * _error(other, ref) + floor * _norm(ref)
        if not error <= allowed:
            problems.append(f"{name}: error {error:.3g}, allowed {allowed:.3g} (eager {_error(other, ref):.3g})")
    assert not problems, "\n".join([case.name, *problems])


def aten_run(case: Case, dtype: torch.dtype, package: Any) -> Run:
    """The joint graph that AOTAutograd traces of the case by itself, after the package's pass.

    Neither Dynamo nor Inductor has seen it: no graph is simplified before, and everything that runs is written out.
    """
    fn, args, leaves = case.build(dtype)
    records: list[GraphRecord] = []
    counters.clear()

    def compiler(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        record = GraphRecord("aten", str(gm.graph))
        records.append(record)
        return make_boxed_func(lambda *a: _Watcher(gm, record).run(*a))

    def rewritten(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> torch.fx.GraphModule:
        hook = inductor_config.joint_custom_pre_pass
        with V.set_fake_mode(detect_fake_mode(inputs)):
            for each in hook if isinstance(hook, (list, tuple)) else (hook,):
                each(gm.graph)
        gm.graph.lint()
        gm.recompile()
        return gm

    with installed(package, case):
        compiled = (aot_module if isinstance(fn, torch.nn.Module) else aot_function)(
            fn,
            compiler,
            inference_compiler=lambda gm, inputs: compiler(rewritten(gm, inputs), inputs),
            partition_fn=lambda gm, inputs, **kw: min_cut_rematerialization_partition(
                rewritten(gm, inputs), inputs, **kw
            ),
            decompositions=select_decomp_table(),
        )
        run = differentiate(case, compiled, args, leaves, True)
    run.graphs, run.counts = records, Counter(counters["lce_inductor"])
    return run


def check_equal(case: Case, ours: Run, theirs: Run) -> None:
    """The very bits."""
    for name, value in ours.results().items():
        other = theirs.results()[name]
        same = value is other is None or (
            isinstance(value, Tensor) and isinstance(other, Tensor) and torch.equal(_bits(value), _bits(other))
        )
        assert same, f"{case.name}: {name} is not what torch.compile gives without the package"


def _bits(t: Tensor) -> Tensor:
    # NaN compares unequal to itself, so floating values are compared as integers.
    return t.contiguous().view(torch.uint8) if t.dtype.is_floating_point and t.dim() else t.nan_to_num(nan=1e30)


def _error(value: Tensor, reference: Tensor) -> float:
    """2-norm of the difference; infinities and NaN must be at the same places and count nothing."""
    a, b = value.double(), reference.double()
    special = ~torch.isfinite(b)
    if not torch.equal(torch.nan_to_num(a[special], nan=1.0), torch.nan_to_num(b[special], nan=1.0)):
        return math.inf
    return (a - b)[~special].norm().item()


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Error as a share of the reference's 2-norm."""
    return _error(value, reference) / max(_norm(reference), 1e-30)


def _norm(t: Tensor) -> float:
    return t.double()[torch.isfinite(t)].norm().item()
