"""Time, memory and error of linear + cross-entropy on your shapes, for every implementation that is installed.

    python -m lce_inductor.bench                                     a default shape for the device
    python -m lce_inductor.bench --head llama-3.2-1b --tokens 16384  the head of a named model
    python -m lce_inductor.bench --shape 8192x2048x128256 --impl torch.compile,lce_inductor
    python -m lce_inductor.bench --sweep V=32768,65536,131072,262144 --csv out.csv --plot out
    python -m lce_inductor.bench --list                              heads, implementations, what is installed

Whole models instead of heads: python -m lce_inductor.bench.models --help

What is measured: the loss of `x [N, H]`, `weight [V, H]`, `target [N]` and, unless --forward-only, its gradients dX
and dW. One row in 16 of the targets is ignored. `--peaked` makes the logits look like those of a trained model: the
target's is 10 to 20 above the others, in place of standard normal ones.

| column | meaning |
|---|---|
| ms | median of --reps steps |
| of floor | that time through the time of the bare matrix products, measured in turns with it in the same process |
| added | most memory that a step adds to the inputs at any time, both gradients included |
| loss, dX, dW | relative error (2-norm) against fp64, for bf16 and fp16 against fp32 products of the same inputs |

A row gets a time only after its loss and gradients were found right; one whose error is above the limit of its dtype
is shown as WRONG with its error. Each row is measured in a process of its own with an empty compile cache, so running
out of memory, or a crash, is a row and not the end. With --in-turns the processes of one shape are there together and
take one step after another, in an order drawn anew for each of --reps rounds; before each timed step, one is not timed.

`floor` is the three matrix products that no implementation can avoid (one with --forward-only), in chunks of rows and
with V rounded up to a multiple of 64, and nothing else.

On CUDA, memory is the allocator's peak; on the CPU it is summed from the profiler's allocation events, since the size
of the process also shows the compiler. rich (a progress bar) and matplotlib (--plot) are optional.
"""
