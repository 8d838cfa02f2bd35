"""Other architectures, each in the setting that spells its loss in its own way."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hf import ROWS, B, Setup, T, V, configured, finish, ids, masked, model, plain, text, tiny

BF16 = torch.bfloat16


def causal(kind: str, **config: Any) -> Setup:
    dtype = config.pop("dtype", None)
    settings = {"dtype": dtype} if dtype is not None else {}
    return plain(tiny(kind, dtype=dtype, **{"use_cache": False, **config}), text(), **settings)


# Decoders that differ in what stands between the head and the loss.

_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "gemma, tied": ("gemma", {"head_dim": 8}),
    "gemma2, softcap": ("gemma2", {"head_dim": 8, "num_hidden_layers": 2}),
    "gemma2, softcap, bf16": ("gemma2", {"head_dim": 8, "num_hidden_layers": 2, "dtype": BF16}),
    "gemma3 text": ("gemma3_text", {"head_dim": 8, "num_hidden_layers": 2}),
    "gemma3 text, softcap": ("gemma3_text", {"head_dim": 8, "num_hidden_layers": 2, "final_logit_softcapping": 30.0}),
    "cohere, scaled": ("cohere", {"logit_scale": 0.0625}),
    "cohere2, scaled": ("cohere2", {"logit_scale": 0.0625, "num_hidden_layers": 2}),
    "granite, divided": ("granite", {"logits_scaling": 8.0}),
    "olmo2": ("olmo2", {}),
    "phi, bias": ("phi", {}),
    "phi3": ("phi3", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gptj, bias": ("gptj", {"rotary_dim": 4}),
    "codegen, bias": ("codegen", {"num_attention_heads": 4, "rotary_dim": 4}),
    "opt": ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 16}),
    "bloom": ("bloom", {}),
    "falcon": ("falcon", {}),
    "mpt": ("mpt", {"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 64}),
    "xglm": ("xglm", {"d_model": 16, "ffn_dim": 32, "num_layers": 1, "attention_heads": 2}),
    "biogpt": ("biogpt", {}),
    "nanochat, softcap": ("nanochat", {}),
    "hyperclovax, scaled": ("hyperclovax", {"logits_scaling": 2.0}),
    "mamba, float head": ("mamba", {"state_size": 4, "time_step_rank": 2}),
    "mamba2, float head": (
        "mamba2", {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8, "expand": 2}
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt_oss": ("gpt_oss", {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "mixtral, auxiliary loss": (
        "mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True}
    ),
    "qwen3_moe, auxiliary loss": (
        "qwen3_moe",
        {
            "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
            "output_router_logits": True,
        },
    ),
    "granitemoe, auxiliary loss": (
        "granitemoe", {"num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True}
    ),
    "gpt2, tied": ("gpt2", {}),
    "bert, causal": ("bert", {"is_decoder": True}),
}  # fmt: skip

for _name, (_kind, _config) in _DECODERS.items():
    model(_name)(lambda kind=_kind, config=_config: causal(kind, **config))


@model("gpt2, loss_type set")
def gpt2_loss_type() -> Setup:
    lm = tiny("gpt2", use_cache=False)
    lm.loss_type = "ForCausalLM"
    return plain(lm, text())


@model("gpt2 double heads")
def gpt2_double() -> Setup:
    from transformers import GPT2DoubleHeadsModel

    lm = finish(GPT2DoubleHeadsModel(configured("gpt2", use_cache=False, num_labels=1)))

    def step(input_ids: Tensor, labels: Tensor, mc_token_ids: Tensor) -> Any:
        out = lm(input_ids=input_ids, labels=labels, mc_token_ids=mc_token_ids)
        return {"loss": out.loss, "logits": out.logits}

    return Setup(step, lm, {**text(), "mc_token_ids": torch.tensor([T - 1] * B)}, rows=B * (T - 1))


# Encoder-decoders: no shift in the loss, a bias buffer in some.


def seq2seq(kind: str, **config: Any) -> Setup:
    lm = tiny(kind, "AutoModelForSeq2SeqLM", use_cache=False, decoder_start_token_id=0, **config)
    return plain(lm, {"input_ids": ids(), "labels": ids()})


_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
_BART = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip
_SEQ2SEQ: dict[str, tuple[str, dict[str, Any]]] = {
    "t5, tied": ("t5", _T5),
    "t5 v1.1": ("t5", {**_T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
    "bart, bias buffer": ("bart", _BART),
    "mbart, bias buffer": ("mbart", _BART),
    "marian, bias buffer": ("marian", {**_BART, "decoder_vocab_size": V}),
    "m2m_100": ("m2m_100", _BART),
}

for _name, (_kind, _config) in _SEQ2SEQ.items():
    model(_name)(lambda kind=_kind, config=_config: seq2seq(kind, **config))


@model("whisper")
def whisper() -> Setup:
    lm = tiny(
        "whisper", "AutoModelForSpeechSeq2Seq", use_cache=False, decoder_start_token_id=1, num_mel_bins=4,
        max_source_positions=16, max_target_positions=32, **_BART,
    )  # fmt: skip
    features = torch.randn(B, 4, 32, generator=torch.Generator().manual_seed(4))
    return plain(lm, {"input_features": features, "labels": ids()})


@model("prophetnet, ngram loss")
def prophetnet() -> Setup:
    lm = tiny(
        "prophetnet", "AutoModelForSeq2SeqLM", use_cache=False, num_encoder_layers=1, num_decoder_layers=1,
        num_encoder_attention_heads=2, num_decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        decoder_start_token_id=0, disable_ngram_loss=False, num_hidden_layers=None, num_attention_heads=None,
        max_position_embeddings=32,
    )  # fmt: skip
    return plain(lm, {"input_ids": ids(), "labels": ids()})


# Masked language models.


def masked_lm(kind: str, **config: Any) -> Setup:
    return plain(tiny(kind, "AutoModelForMaskedLM", **config), masked())


_MASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "roberta": ("roberta", {}),
    "xlm-roberta": ("xlm-roberta", {}),
    "distilbert": ("distilbert", {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}),
    "albert": ("albert", {"embedding_size": 8}),
    "deberta-v2": ("deberta-v2", {}),
    "electra": ("electra", {"embedding_size": 16}),
    "modernbert": ("modernbert", {"global_attn_every_n_layers": 1, "cls_token_id": 1, "sep_token_id": 2}),
}

for _name, (_kind, _config) in _MASKED.items():
    model(f"{_name} masked LM")(lambda kind=_kind, config=_config: masked_lm(kind, **config))


@model("modernbert masked LM, sparse prediction")
def modernbert_sparse() -> Setup:
    # The head reads the asked rows alone.
    setup = masked_lm(
        "modernbert", global_attn_every_n_layers=1, cls_token_id=1, sep_token_id=2, sparse_prediction=True
    )
    return dataclasses.replace(setup, rows=int((setup.inputs["labels"] != -100).sum()))


@model("bert pre-training, two losses")
def bert_pretraining() -> Setup:
    lm = tiny("bert", "AutoModelForPreTraining")

    def step(next_sentence_label: Tensor, **inputs: Tensor) -> Any:
        out = lm(next_sentence_label=next_sentence_label, **inputs)
        return {"loss": out.loss, "logits": out.prediction_logits}

    return Setup(step, lm, {**masked(), "next_sentence_label": torch.tensor([0, 1])})


# Other modalities and heads.


@model("vit with 211 classes")
def vit() -> Setup:
    batch = 40
    lm = tiny(
        "vit", "AutoModelForImageClassification", image_size=4, patch_size=2, num_channels=3, num_labels=V
    )  # fmt: skip
    pixels = torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    return plain(lm, {"pixel_values": pixels, "labels": ids(1, batch)[:, 0]}, rows=batch)


@model("musicgen decoder, four codebooks")
def musicgen() -> Setup:
    from transformers import MusicgenForCausalLM

    config = configured(
        "musicgen_decoder", ffn_dim=32, num_codebooks=4, pad_token_id=V, bos_token_id=V, use_cache=False
    )  # fmt: skip
    lm = finish(MusicgenForCausalLM(config))
    codes = torch.randint(V, (B * 4, T), generator=torch.Generator().manual_seed(6))
    labels = torch.randint(V, (B, T, 4), generator=torch.Generator().manual_seed(7))
    return plain(lm, {"input_ids": codes, "labels": labels}, rows=ROWS)


@model("wav2vec2 CTC")
def wav2vec2() -> Setup:
    lm = tiny(
        "wav2vec2", "AutoModelForCTC", conv_dim=(8, 8), conv_stride=(4, 4), conv_kernel=(4, 4),
        num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0, layerdrop=0.0,
    )  # fmt: skip
    waves = torch.randn(B, 16 * 2 * T, generator=torch.Generator().manual_seed(4))
    return plain(lm, {"input_values": waves, "labels": ids(4)}, rows=B * 2 * T)


@model("qwen2_vl, text only")
def qwen2_vl() -> Setup:
    lm = tiny(
        "qwen2_vl", "AutoModelForImageTextToText",
        text_config={
            "vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "use_cache": False,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "patch_size": 2},
    )  # fmt: skip
    return plain(lm, text())


@model("gemma3 with images, text only")
def gemma3_vision() -> Setup:
    lm = tiny(
        "gemma3", "AutoModelForImageTextToText",
        text_config={
            "vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "use_cache": False,
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 8, "patch_size": 2,
        },
        mm_tokens_per_image=4, image_token_index=V - 1,
    )  # fmt: skip
    inputs = text()
    return plain(lm, {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])})


@model("llava, text only")
def llava() -> Setup:
    lm = tiny(
        "llava", "AutoModelForImageTextToText", image_token_index=V - 1,
        text_config={
            "model_type": "llama", "vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "use_cache": False,
        },
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 16,
        },
    )  # fmt: skip
    return plain(lm, text())


@model("qwen2_audio, text only")
def qwen2_audio() -> Setup:
    # Its loss reads logits selected by the attention mask; the selection breaks the graph.
    lm = tiny(
        "qwen2_audio", "AutoModelForSeq2SeqLM", audio_token_index=V - 1,
        text_config={
            "model_type": "qwen2", "vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "use_cache": False,
        },
        audio_config={
            "model_type": "qwen2_audio_encoder", "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32, "num_mel_bins": 4, "max_source_positions": 16,
        },
    )  # fmt: skip
    inputs = text()
    return plain(lm, {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}, rows=B * (T - 1))


@model("jamba, auxiliary loss")
def jamba() -> Setup:
    return causal(
        "jamba", num_hidden_layers=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, num_experts=2, num_experts_per_tok=1, mamba_d_state=4, mamba_dt_rank=2,
        use_mamba_kernels=False, output_router_logits=True,
    )  # fmt: skip


@model("falcon_h1, head multiplier")
def falcon_h1() -> Setup:
    return causal(
        "falcon_h1", head_dim=8, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_d_state=4, mamba_chunk_size=8,
        lm_head_multiplier=0.5,
    )  # fmt: skip


@model("generic causal LM written by hand, head on a view")
def hand_written() -> Setup:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(V, 16)
            self.head = nn.Linear(16, V, bias=False)

        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.head(self.embed(input_ids))
            flat = logits[:, :-1].reshape(-1, V)
            return {"loss": F.cross_entropy(flat, labels[:, 1:].reshape(-1)), "logits": logits}

    return plain(finish(Small()), text(), rows=B * (T - 1))
