"""Hugging Face models as they stand: their logits must be gone, their losses, logits and gradients as in eager.

Tiny random models through AutoModel classes, nothing downloaded, no code generation (see corpus/harness.py). Every
case returns loss and logits, as these models do, so the check for held logits is one of deferred logits too.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from corpus import codes, hf, hf_llama, hf_models
from turns import one_of

import lce_inductor

# What is not rewritten, with the codes that may name it. All others are.
LEFT_ALONE: dict[str, tuple[str, ...]] = {
    # The loss alone would be rewritten; but the sum of a linear and of a low-rank product is returned, too.
    "llama LoRA on the head": (codes.RETURNED,),
    # transformers breaks the graph between head and loss: these classes have no loss type of their own, and the
    # warning about it goes through a logger. Setting model.loss_type = "ForCausalLM" mends it.
    "gpt2, tied": (codes.RETURNED_UNREAD,),
    "bert, causal": (codes.RETURNED_UNREAD,),
    # The loss selects logits by a mask whose size only the run knows: the graph breaks there.
    "qwen2_audio, text only": (codes.RETURNED_UNREAD,),
    # The logits of four heads are stacked, and the stack is returned.
    "musicgen decoder, four codebooks": (codes.CROSSING, codes.RETURNED),
    # CTC reads the whole distribution.
    "wav2vec2 CTC": (codes.RETURNED_UNREAD,),
}
if torch.__version__.startswith("2.11."):
    # This torch cannot trace what transformers puts in place of grouped products on a CPU: it breaks the graph there.
    LEFT_ALONE |= dict.fromkeys(
        (
            "gpt_oss",
            "qwen3_moe, auxiliary loss",
            "mixtral, auxiliary loss",
            "granitemoe, auxiliary loss",
            "jamba, auxiliary loss",
        ),
        ("no-head",),
    )
LLAMA = [name for name in hf.MODELS if name.startswith("llama")]
OTHERS = [name for name in hf.MODELS if not name.startswith("llama")]
# Those of a line have the same head and the same loss behind it; of what stands before it nothing is asked here.
ALIKE = (
    "mistral, qwen2, qwen3, olmo2, phi3, gpt_neox, opt, bloom, falcon, mpt, xglm, biogpt, gpt_oss, deepseek_v3",
    "phi, bias; gptj, bias; codegen, bias",
    "cohere, scaled; cohere2, scaled; hyperclovax, scaled",
    "gemma2, softcap; gemma3 text, softcap; nanochat, softcap",
    "mamba, float head; mamba2, float head",
    "bart, bias buffer; mbart, bias buffer; marian, bias buffer",
    "t5 v1.1; m2m_100",
    "qwen2_vl, text only; llava, text only",
    "mixtral, auxiliary loss; qwen3_moe, auxiliary loss; granitemoe, auxiliary loss",
    "roberta masked LM, xlm-roberta masked LM, distilbert masked LM, albert masked LM, electra masked LM, "
    "deberta-v2 masked LM, modernbert masked LM",
)


def by_turns() -> list[str]:
    """All models but those that are like others; of these some, and one of each line at least."""
    lines = [line.split("; " if ";" in line else ", ") for line in ALIKE]
    left_out = {name for line in lines for name in set(line) - set(one_of(3, line) or line[:1])}
    assert left_out < set(OTHERS)
    return [name for name in (*LLAMA, *OTHERS) if name not in left_out]


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()


@pytest.mark.parametrize("name", by_turns())
def test_model(name: str) -> None:
    if "LoRA" in name:
        pytest.importorskip("peft")
    if "accelerate" in name:
        pytest.importorskip("accelerate")
    outcome = hf.run(hf.MODELS[name](), lce_inductor)
    worst = max(outcome.errors, key=lambda k: outcome.errors[k])
    tolerance = 1e-4 if outcome.setup.dtype == torch.float32 else 3e-2
    assert outcome.errors[worst] <= tolerance, f"{name}: {worst}: relative error {outcome.errors[worst]:.3g}"
    seen = f"{name}: {outcome.counts['rewritten']} rewritten, refused {outcome.codes}"
    assert "internal-error" not in outcome.codes, seen
    if name in LEFT_ALONE:
        assert set(outcome.codes) & set(LEFT_ALONE[name]), f"{seen}; expected one of {LEFT_ALONE[name]}"
        return
    assert outcome.counts["rewritten"] >= 1, seen
    largest = outcome.largest
    assert largest.largest < outcome.limit, (
        f"{name}: {largest.largest_node} of the {largest.kind} graph has {largest.largest} elements, "
        f"N * V = {outcome.limit}"
    )


def test_enough_models() -> None:
    """The list of settings and architectures stays as long as it is meant to be."""
    assert len(LLAMA) == 22 and len(OTHERS) >= 25
    assert set(LEFT_ALONE) <= set(hf.MODELS)
    assert hf_llama.__name__ and hf_models.__name__  # imported to fill the list


@pytest.mark.parametrize("name", ["llama", "bart, bias buffer", "gemma2, softcap", "bert masked LM"])
def test_logits_kept(name: str) -> None:
    """returned_logits="keep": the same losses, and gradients through the logits as well; logits that have to exist are
    not computed a second time for the loss."""
    outcome = hf.run(hf.MODELS[name](), lce_inductor, returned_logits="keep")
    assert max(outcome.errors.values()) <= 1e-4
    assert outcome.counts["rewritten"] == 0 and set(outcome.codes) == {codes.RETURNED}
