"""The losses against TRL's own trainers, the merge against what was trained, and sampling against itself."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shipyard.training.batches import collate
from shipyard.training.dataset import Pair, Sample
from shipyard.training.dpo import PreferenceTuning
from shipyard.training.lora import add_adapters, base_weight, merge, merged_weights
from shipyard.training.loss import clipped_policy_loss, dpo_losses, kl_to_reference, target_log_probs
from shipyard.training.models import keep_one_arithmetic
from shipyard.training.optim import learning_rate
from shipyard.training.recipe import Lora, Optim, parse_recipe
from shipyard.training.reference import Reference
from shipyard.training.rollout import generate
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def sample(ids: list[int], prompt: int) -> Sample:
    mask = np.arange(len(ids)) >= prompt
    return Sample("row", np.asarray(ids, np.int32), mask)


def pairs() -> list[Pair]:
    rng = np.random.default_rng(3)
    made = []
    for _ in range(5):
        prompt = rng.integers(3, 380, 6).tolist()
        chosen, rejected = (prompt + rng.integers(3, 380, int(rng.integers(2, 12))).tolist() for _ in range(2))
        made.append(Pair("row", sample(chosen, 6), sample(rejected, 6)))
    return made


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge"])
def test_dpo_equals_trl(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    """Our loss and gradient on a batch of pairs are those of TRL's trainer on the same ids."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    recipe = parse_recipe(
        {
            "method": "dpo",
            "steps": 1,
            "model": {"name": "m"},
            "data": {"train": "x"},
            "dpo": {"loss": kind, "beta": 0.2},
        }
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():  # a policy that has moved away from its reference
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.01)
    rows = pairs()
    method = PreferenceTuning(recipe, rows, Reference(reference))
    loss, numbers = method.loss(model, rows, method.totals(rows))
    loss.backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    settings = DPOConfig(
        output_dir=str(tmp_path), loss_type=[kind], beta=0.2, per_device_train_batch_size=5, use_cpu=True, report_to=[],
        max_length=None, gradient_checkpointing=False, bf16=False,
    )  # fmt: skip
    words = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    trainer = DPOTrainer(
        model=model, ref_model=reference, args=settings, train_dataset=words, processing_class=tokenizer
    )
    features = [
        {
            "prompt_ids": pair.chosen.ids[:6].tolist(),
            "chosen_ids": pair.chosen.ids[6:].tolist(),
            "rejected_ids": pair.rejected.ids[6:].tolist(),
        }
        for pair in rows
    ]
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator(features))
    theirs.backward()
    assert numbers["loss"] == pytest.approx(float(theirs.detach()), rel=1e-5)
    for mine, parameter in zip(ours, model.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.allclose(mine, parameter.grad, rtol=1e-3, atol=1e-6)


def test_dpo_losses_by_hand() -> None:
    chosen, rejected = torch.tensor([1.0]), torch.tensor([0.5])
    assert float(dpo_losses(chosen, rejected, "sigmoid", 0.1, 0.0)) == pytest.approx(math.log1p(math.exp(-0.05)))
    assert float(dpo_losses(chosen, rejected, "ipo", 0.1, 0.0)) == pytest.approx((0.5 - 5.0) ** 2)
    assert float(dpo_losses(chosen, rejected, "hinge", 0.1, 0.0)) == pytest.approx(0.95)


def test_policy_loss_clips_only_what_would_gain_from_moving_further() -> None:
    old = torch.zeros(4)
    new = torch.log(torch.tensor([1.5, 1.5, 0.5, 0.5]))
    loss, clipped = clipped_policy_loss(new, old, torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2, 0.3)
    assert loss.tolist() == pytest.approx([-1.3, 1.5, -0.5, 0.8])
    assert clipped.tolist() == [True, False, False, True]


@given(st.floats(-5, 0), st.floats(-5, 0))
def test_kl_estimate_is_never_negative(policy: float, reference: float) -> None:
    assert float(kl_to_reference(torch.tensor(policy), torch.tensor(reference))) >= -1e-6


def test_learning_rate_has_its_landmarks() -> None:
    optim = Optim(lr=1.0, warmup_steps=10, schedule="cosine", final_lr_fraction=0.1)
    assert [learning_rate(optim, step, 110) for step in (0, 9, 10)] == pytest.approx([0.1, 1.0, 1.0])
    assert learning_rate(optim, 60, 110) == pytest.approx(0.55)
    assert learning_rate(optim, 110, 110) == pytest.approx(0.1)


def quantized(directory: Path) -> torch.nn.Module:
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=nf4, dtype=torch.float32)
    keep_one_arithmetic(model)
    return model


def test_merge_gives_the_model_that_was_trained_and_not_its_neighbour(tiny_model: Path) -> None:
    """Merging onto the dequantized base reproduces the trained logits; onto the original base it does not."""
    model = add_adapters(quantized(tiny_model), Lora(rank=8, alpha=16), seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    ids = torch.arange(3, 83)[None]
    plain = merge(model, str(tiny_model), torch.float32)
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        distance = float((plain(input_ids=ids).logits - trained).abs().max())
        usual = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        weights, originals = merged_weights(model, torch.float32), usual.state_dict()
        for name, layer in model.get_base_model().named_modules():
            if hasattr(layer, "lora_A"):
                delta = weights[f"{name}.weight"] - base_weight(layer.get_base_layer())
                originals[f"{name}.weight"].add_(delta)
        usual_distance = float((usual(input_ids=ids).logits - trained).abs().max())
    assert distance < 1e-4
    assert usual_distance > 20 * distance, (usual_distance, distance)


def test_greedy_replies_equal_transformers_and_do_not_depend_on_the_batch(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    prompts = [[5, 6, 7], [8] * 11, [9, 10]]
    together = generate(model, prompts, 12, frozenset({2}))
    for prompt, [reply] in zip(prompts, together, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0
        )
        assert reply.ids == theirs[0, len(prompt) :].tolist()


def test_a_reply_is_drawn_from_its_own_seed_and_its_log_probs_are_true(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    prompts, seeds = [[5, 6, 7], [8] * 11], [(1, 0), (1, 1)]
    both = generate(model, prompts, 8, frozenset({2}), 0.9, seeds, replies=3)
    second = generate(model, prompts[1:], 8, frozenset({2}), 0.9, seeds[1:], replies=3)
    assert [reply.ids for reply in both[1]] == [reply.ids for reply in second[0]]
    assert len({tuple(reply.ids) for reply in both[0]}) > 1
    for reply in both[0]:
        batch = collate([sample(prompts[0] + reply.ids, 3)], packing=True)
        with torch.no_grad():
            assert target_log_probs(model, batch, 0.9).tolist() == pytest.approx(reply.log_probs, abs=1e-4)


def test_sampling_follows_the_distribution(tiny_model: Path) -> None:
    """Chi-square over the first token of 4,000 draws, against the model's own probabilities."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    draws = generate(model, [[5, 6, 7]], 1, frozenset(), 0.5, [(7,)], replies=4000)
    counts = np.bincount([reply.ids[0] for reply in draws[0]], minlength=384)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1]
    expected = (logits.float() / 0.5).softmax(-1).double().numpy() * 4000
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < 383 + 5 * math.sqrt(2 * 383)
