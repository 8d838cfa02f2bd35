"""The row kernel: every case under Triton's interpreter. test_other_gpus.py compiles it."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    import rows_cases

    # The interpreter truncates where the GPU rounds to bf16: up to twice the error.
    FACTOR = 2.5
    SM_90 = rows_cases.Planned(device=rows_cases.SM_90, policy=rows_cases.ALWAYS_OURS)

    @pytest.mark.parametrize("case", rows_cases.CASES, ids=str)
    def test_against_fp64(case):
        rows_cases.check(case, "cpu", FACTOR)

    @pytest.mark.parametrize("case", rows_cases.IN_BLOCKS, ids=str)
    def test_blocks_of_classes(case):
        rows_cases.check(case, "cpu", FACTOR, rows_cases.Planned(classes=64))

    @pytest.mark.parametrize("name", ["only_what_was_asked", "not_finite", "masked_classes", "padding", "ties"])
    def test_special(name):
        getattr(rows_cases, f"check_{name}")("cpu")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("H, by_us", [(192, True), (190, False), (256, False)])
    def test_gradients_on_sm_90(dtype, H, by_us, monkeypatch):
        """By hopper_dx.cuh where rows are aligned, by hopper_dw.cuh where its tiles fit, too; the first overwrites."""
        import hopper_emulated

        launched = hopper_emulated.emulate(monkeypatch)
        case = rows_cases.Case(N=23, H=H, V=101, dtype=dtype, chunk_tokens=8)
        rows_cases.check(case, "cpu", FACTOR, SM_90)
        # Three chunks, in the forward and in the backward.
        assert launched.count("dw") == (6 if by_us else 0) and launched.count("dx") == (6 if H % 8 == 0 else 0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_logits_that_come_with_lse_on_sm_90(dtype, monkeypatch):
        """Where nothing else needs a pass over the logits; the last tile of classes is not full."""
        import hopper_emulated

        stats, mask = rows_cases.LSE | rows_cases.TARGET, (True, True, False)
        case = rows_cases.Case(N=23, H=40, V=401, K=2, dtype=dtype, chunk_tokens=8, grads=("lse", "target"))
        a, grads = rows_cases.make(case, "cpu")
        plain = rows_cases.Planned()
        want_forward, want = plain.forward(a, stats), plain.with_grad(a, stats, grads, mask)
        launched = hopper_emulated.emulate(monkeypatch)
        found_forward, found = SM_90.forward(a, stats), SM_90.with_grad(a, stats, grads, mask)
        names = ["PLAIN STORE SUM" if dtype == torch.bfloat16 else "HALF PLAIN STORE SUM"] * 3
        assert [name for name in launched if name != "dx"] == names * 2 and launched.count("dx") == 3
        for ours, theirs in zip((*found_forward, *found[0], *found[1:]), (*want_forward, *want[0], *want[1:])):
            rounding = {torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(ours.dtype, 1e-5)
            torch.testing.assert_close(ours, theirs, rtol=rounding, atol=1e-6)
        launched.clear()
        SM_90.forward(a, stats | rows_cases.SUM)
        SM_90.forward(a._replace(bias=torch.zeros(401, dtype=dtype)), stats)
        SM_90.forward(a._replace(epilogue=(("mul", 2.0),)), stats)
        assert not launched

    def test_target_out_of_bounds():
        a, _ = rows_cases.make(rows_cases.Case(), "cpu")
        for bad in (a.weight.shape[0], -1):
            a.target[1] = bad
            with pytest.raises(RuntimeError, match="target out of bounds"):
                rows_cases.Planned().forward(a, rows_cases.LSE)

else:

    def test_under_the_interpreter():
        """A process of its own: Triton reads the variable when a kernel is defined."""
        env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
            check=False, env=env, capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
