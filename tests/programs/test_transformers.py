"""Hugging Face transformers with small random weights has the same results on a slice as on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed; `make programs` does that")
pytest.importorskip("accelerate", reason="accelerate is not installed; `make programs` does that")

from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

WORDS = 99


def bert() -> torch.nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=37,
            max_position_embeddings=64,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def gpt2() -> torch.nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=WORDS,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def llama() -> torch.nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def batch(place: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, WORDS, (4, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    labels = torch.tensor([0, 1, 2, 1]) if isinstance(model, BertForSequenceClassification) else ids
    return {"input_ids": ids.to(place), "attention_mask": mask.to(place), "labels": labels.to(place)}


@pytest.mark.parametrize("make", [bert, gpt2, llama])
def test_training_gives_the_losses_of_the_cpu(lease: object, make: Any) -> None:
    def train(place: str) -> list[float]:
        torch.manual_seed(0)
        model = make().to(place)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(**batch(place, model)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        return losses

    losses = train("cuda")
    assert losses == pytest.approx(train("cpu"), rel=1e-4)
    assert losses[2] < losses[0]


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": True, "top_k": 5, "top_p": 0.9, "temperature": 0.7},
    ],
    ids=["greedy", "beams", "no cache", "static cache", "sampling"],
)
def test_generated_words_are_those_of_the_cpu(lease: object, make: Any, how: dict) -> None:
    def generate(place: str) -> list:
        torch.manual_seed(0)
        model = make().to(place).eval()
        prompt = batch(place, model)
        torch.manual_seed(5)
        return model.generate(
            prompt["input_ids"][:2, :5],
            attention_mask=prompt["attention_mask"][:2, :5],
            max_new_tokens=8,
            **how,
        ).tolist()

    assert generate("cuda") == generate("cpu")


def test_mixed_precision_half_weights_and_checkpointing(lease: object) -> None:
    torch.manual_seed(0)
    model = llama().cuda()
    whole = model(**batch("cuda", model)).loss.item()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(**batch("cuda", model)).loss
    loss.backward()
    assert loss.item() == pytest.approx(whole, rel=0.02)
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable()
    model(**batch("cuda", model)).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.to(torch.bfloat16)
    assert model(**batch("cuda", model)).loss.item() == pytest.approx(whole, rel=0.02)


def test_models_are_saved_and_loaded_onto_a_device(lease: object, tmp_path: Path) -> None:
    model = gpt2().cuda().eval()
    model.save_pretrained(tmp_path)
    again = GPT2LMHeadModel.from_pretrained(tmp_path, device_map="cuda:1").eval()
    assert str(again.device) == "cuda:1"
    words = batch("cpu", model)["input_ids"]
    assert torch.equal(again(words.to("cuda:1")).logits.cpu(), model(words.cuda()).logits.cpu())


class Words(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, n: int) -> dict[str, Any]:
        ids = torch.randint(3, WORDS, (10,), generator=torch.Generator().manual_seed(n))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": int(ids[0]) % 3}


class TestTrainer:
    @pytest.fixture(autouse=True)
    def fresh(self) -> None:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._reset_state()

    def trainer(self, folder: Path, **options: Any) -> Trainer:
        set_seed(0)
        arguments = TrainingArguments(
            str(folder),
            num_train_epochs=2,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            logging_steps=2,
            save_steps=2,
            report_to=[],
            disable_tqdm=True,
            **options,
        )
        return Trainer(
            model=bert(),
            args=arguments,
            train_dataset=Words(),
            eval_dataset=Words(),
            compute_metrics=lambda p: {"right": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        )

    @pytest.mark.parametrize(
        "options",
        [{}, {"fp16": True}, {"bf16": True}, {"optim": "adamw_torch_fused", "gradient_checkpointing": True}],
        ids=["plain", "fp16", "bf16", "fused and checkpointing"],
    )
    def test_it_finds_the_slices_and_trains(self, lease: object, tmp_path: Path, options: dict) -> None:
        trainer = self.trainer(tmp_path, **options)
        assert trainer.args.n_gpu == 2
        assert str(trainer.args.device) == "cuda:0"
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()
        assert after["eval_loss"] < before
        assert 0 <= after["eval_right"] <= 1

    def test_it_resumes(self, lease: object, tmp_path: Path) -> None:
        self.trainer(tmp_path).train()
        steps = sorted(p.name for p in tmp_path.glob("checkpoint-*"))
        assert steps == ["checkpoint-2", "checkpoint-4"]
        resumed = self.trainer(tmp_path)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert resumed.state.global_step == 4
