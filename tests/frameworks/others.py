"""Lightning, x-transformers, timm, sentence-transformers."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hf import llama, texts
from .measure import BATCH, H, Run, T, V, case


@case("Lightning", "lightning transformers", line="lce_inductor.defer(self.lm_head)")
def lightning(run: Run) -> None:
    import lightning as L

    class Lit(L.LightningModule):
        """As the documentation writes them: the loss is computed in training_step."""

        def __init__(self) -> None:
            super().__init__()
            self.model = llama().model
            self.lm_head = nn.Linear(H, V)

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            logits = self.lm_head(self.model(batch["input_ids"]).last_hidden_state)
            loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:])
            self.log("loss", loss)
            return loss

        def on_train_batch_end(self, outputs: Any, *args: Any) -> None:
            run.loss(outputs["loss"])

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            run.gradients_of(self)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 1e-2)

    torch.manual_seed(0)
    made = Lit()
    run.defer(made.lm_head)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(made, torch.utils.data.DataLoader(texts(3 * BATCH), BATCH))


def x_transformers(run: Run, compile: bool, **more: Any) -> None:
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    torch.manual_seed(0)
    net = TransformerWrapper(
        num_tokens=V, max_seq_len=T, attn_layers=Decoder(dim=H, depth=1, heads=2, attn_dim_head=8), **more
    )
    model = AutoregressiveWrapper(net)
    if not compile:
        run.defer(net.to_logits)
    call = torch.compile(model) if compile else model
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        run.step(call(torch.randint(0, V, (BATCH, T), generator=g)), model)


@case("x-transformers", "x-transformers", line="lce_inductor.defer(model.net.to_logits)")
def x_transformers_eager(run: Run) -> None:
    x_transformers(run, compile=False)


@case("x-transformers, torch.compile(model)", "x-transformers")
def x_transformers_compiled(run: Run) -> None:
    x_transformers(run, compile=True)


CLASSES = 4099  # so that logits are larger than images


def timm(run: Run, compile_model: bool, soft: bool, compile_loss: bool = False) -> None:
    for name in ("", ".transforms", ".transforms.functional", ".ops", ".ops.misc", ".datasets", ".models", ".utils"):
        sys.modules.setdefault(f"torchvision{name}", mock.MagicMock())  # its wheels are for CUDA
    import timm
    from timm.loss import SoftTargetCrossEntropy
    from timm.task import ClassificationTask

    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=H, depth=1, num_heads=2, num_classes=CLASSES, global_pool="token"
    )
    batches = []
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        images, target = torch.randn(32, 3, 32, 32, generator=g), torch.randint(0, CLASSES, (32,), generator=g)
        if soft:
            target = F.one_hot(target, CLASSES) * 0.9 + F.one_hot(target.flip(0), CLASSES) * 0.1
        batches.append((images, target))
    run.defer(model.get_classifier())
    task = ClassificationTask(model, SoftTargetCrossEntropy() if soft else None, device=torch.device("cpu"))
    if compile_model:
        task.compile()
    if compile_loss:
        run.compiled(task.criterion)
    for images, target in batches:
        run.step(task(images, target)["loss"], model)


TIMM = "lce_inductor.defer(model.get_classifier())"


@case("timm ClassificationTask", "timm", line=TIMM, logits=32 * CLASSES)
def timm_labels(run: Run) -> None:
    timm(run, compile_model=False, soft=False)


@case("timm ClassificationTask, SoftTargetCrossEntropy", "timm", line=TIMM, logits=32 * CLASSES)
def timm_soft(run: Run) -> None:
    timm(run, compile_model=False, soft=True)


@case(
    "timm ClassificationTask, SoftTargetCrossEntropy, compiled", "timm", line=TIMM + "; task.criterion.compile()",
    logits=32 * CLASSES,
)  # fmt: skip
def timm_soft_compiled_loss(run: Run) -> None:
    timm(run, compile_model=False, soft=True, compile_loss=True)


@case("timm task.compile(), SoftTargetCrossEntropy", "timm", line=TIMM, logits=32 * CLASSES)
def timm_soft_compiled(run: Run) -> None:
    timm(run, compile_model=True, soft=True)


def sentence_transformer() -> Any:
    import transformers
    from sentence_transformers import SentenceTransformer, models

    folder = Path(tempfile.mkdtemp())
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(50))]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=H, num_hidden_layers=1, num_attention_heads=2, intermediate_size=2 * H,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    inner = models.Transformer(str(folder))
    return SentenceTransformer(modules=[inner, models.Pooling(H)], device="cpu")


PAIRS = 512  # so that similarities are larger than what the encoder makes


def negatives(run: Run, compile: bool) -> None:
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    model = sentence_transformer()
    loss = MultipleNegativesRankingLoss(model)
    if compile:
        run.compiled(loss)
    g = torch.Generator().manual_seed(1)
    pairs = [[f"w{i} w{j}" for i, j in torch.randint(0, 50, (PAIRS, 2), generator=g).tolist()] for _ in range(2)]
    features = [model.tokenize(texts) for texts in pairs]
    for _ in range(2):
        run.step(loss([dict(f) for f in features], torch.zeros(PAIRS)), model)


@case(
    "sentence-transformers MultipleNegativesRankingLoss",
    "sentence-transformers",
    line="loss.compile()",
    logits=PAIRS * PAIRS,
)
def negatives_compiled(run: Run) -> None:
    negatives(run, compile=True)
