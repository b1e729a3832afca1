"""transformers models through the Triton kernels, under the interpreter, against their own code."""

import numpy as np
import pytest
import torch
from shipyard.kernels.accuracy import MAX_BAR, CardProducts, error_ratios, hold_bars
from shipyard.kernels.huggingface import plug, spares_logits
from shipyard.launch.assets import resolve
from shipyard.training.batches import collate
from shipyard.training.dataset import Sample
from shipyard.training.sft import next_token_loss
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

SMALL = dict(
    vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, head_dim=16,
)  # fmt: skip
DEEPSEEK = dict(
    SMALL, num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16,
    v_head_dim=16, first_k_dense_replace=2, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
    n_shared_experts=1, moe_intermediate_size=32, head_dim=16,
)  # fmt: skip
CONFIGS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=7),
    "deepseek_v3": lambda: DeepseekV3Config(**DEEPSEEK),
}
LENGTHS = [5, 1, 12]


def step(model, ids, positions, labels):
    """Loss and gradients of one packed step."""
    model.zero_grad()
    with CardProducts():
        loss = model(input_ids=ids, position_ids=positions, labels=labels, use_cache=False).loss
        loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def batch(vocabulary, lengths, seed=1):
    torch.manual_seed(seed)
    ids = torch.randint(0, vocabulary, (1, sum(lengths)))
    return ids, torch.cat([torch.arange(length) for length in lengths])[None], ids.masked_fill(ids % 4 == 0, -100)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_model_type_in_fp64(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="sdpa").double().train()
    ids, positions, labels = batch(97, LENGTHS)
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    stock = step(model, ids, positions, labels)
    plugged = plug(model, "triton")
    assert set(plugged.parts) == {"attention", "rope", "rms_norm", "swiglu", "loss"}
    mine = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(mine.double(), logits.double(), rtol=1e-6, atol=1e-6)  # stock norms and loss are fp32
    for x, y in zip(step(model, ids, positions, labels), stock, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-5, atol=1e-6)
    plugged.remove()
    again = step(model, ids, positions, labels)
    assert all(torch.equal(x, y) for x, y in zip(again, stock, strict=True))


TEXT = (
    "The union of the states is strong. We know the way to the house of the old man who was the first of them all, "
    "and it is not so far as they say."
)


def smollm2(layers: int, vocabulary: int | None, dtype: torch.dtype):
    """SmolLM2-135M's first layers with their real weights, and a packed row of real text; ids from `vocabulary` on
    are left out of both."""
    path = resolve("asset:smollm2-135m-instruct")
    model = AutoModelForCausalLM.from_pretrained(
        path, num_hidden_layers=layers, dtype=dtype, attn_implementation="eager"
    )
    ids = AutoTokenizer.from_pretrained(path)(TEXT, return_tensors="pt").input_ids
    if vocabulary:
        model.resize_token_embeddings(vocabulary)
        ids = ids[ids < vocabulary][None]
    ids = ids[:, :29]
    positions = torch.cat([torch.arange(20), torch.arange(ids.shape[1] - 20)])[None]
    labels = ids.masked_fill(torch.arange(ids.shape[1]) % 7 == 3, -100)
    return model.train(), ids, positions, labels


def three_ways(model, run, dtype):
    """What `run` gives plugged, with the model's own code in the same dtype, and in fp64."""
    eager = run()
    plugged = plug(model, "triton")
    assert set(plugged.parts) == {"attention", "rope", "rms_norm", "swiglu", "loss"}
    mine = run()
    plugged.remove()
    model.double()
    exact = run()
    model.to(dtype)
    return mine, eager, exact


@pytest.mark.parametrize(("layers", "vocabulary"), [(2, 2048), pytest.param(4, None, marks=pytest.mark.kernels_full)])
def test_smollm2_logits_and_training_step(layers, vocabulary):
    """Real weights in bf16: the logits, the loss and all gradients (as one vector, since a small tensor's ratio is
    luck) are no further from fp64 than PyTorch's."""
    model, ids, positions, labels = smollm2(layers, vocabulary, torch.bfloat16)

    def logits():
        with torch.no_grad(), CardProducts():
            return [model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]]

    mine, eager, exact = three_ways(model, logits, torch.bfloat16)
    hold_bars(f"SmolLM2 logits, {layers} layers", mine, eager, exact)
    mine, eager, exact = three_ways(model, lambda: step(model, ids, positions, labels), torch.bfloat16)
    flat = [[torch.cat([x.flatten() for x in way[1:]])] for way in (mine, eager, exact)]
    hold_bars(f"SmolLM2 training step, {layers} layers", *flat)
    assert abs(mine[0].double() - exact[0]) <= 2 * abs(eager[0].double() - exact[0]) + 1e-6


def smollm_shape(layers=2):
    """SmolLM2-135M's widths: 576 wide, 9 query and 3 key heads of 64; a smaller vocabulary."""
    return LlamaConfig(
        vocab_size=1024, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip


@pytest.mark.kernels_full
@pytest.mark.parametrize(("dtype", "draws"), [(torch.bfloat16, 1), (torch.float32, 6)])
def test_one_training_step_at_smollm_shape(dtype, draws):
    """Loss and every gradient, pooled, no further from fp64 than the PyTorch path in the same dtype.

    In fp32 most of the error is that of the linear layers, which both paths share: one draw's ratio is 0.97 to 1.03 by
    luck, so several are taken and their mean may pass 1 by twice its standard error.
    """
    ratios = []
    for seed in range(draws):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(smollm_shape(), attn_implementation="eager").train().to(dtype)
        ids, positions, labels = batch(1024, [20, 9], seed + 100)
        eager = step(model, ids, positions, labels)
        plugged = plug(model, "triton")
        mine = step(model, ids, positions, labels)
        plugged.remove()
        exact = step(model.double(), ids, positions, labels)
        # all gradients as one vector: a single small tensor's ratio is luck
        flat = [[torch.cat([x.flatten() for x in way[1:]])] for way in (mine, eager, exact)]
        ratios += error_ratios(f"training step {dtype}", *flat)
        assert abs(mine[0].double() - exact[0]) <= 2 * abs(eager[0].double() - exact[0]) + 1e-6
    logs = torch.tensor([ratio.rms for ratio in ratios]).log()
    assert logs.mean() <= (2 * logs.std() / draws**0.5 if draws > 1 else 0.0), ratios
    assert max(ratio.largest for ratio in ratios) <= MAX_BAR


@pytest.mark.parametrize("packing", [True, False])
def test_our_loss_takes_the_heads_kernel(packing, monkeypatch):
    """The loop's own loss, z-loss too: with the kernels no logits are made, and value and gradients are the same."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"](), attn_implementation="sdpa").double().train()
    rows = [np.random.default_rng(seed).integers(0, 97, length) for seed, length in enumerate(LENGTHS[::2])]
    batch = collate([Sample("", ids, np.arange(len(ids)) % 3 != 0) for ids in rows], packing)

    def loss_and_gradients():
        model.zero_grad()
        loss, numbers = next_token_loss(model, batch, 7.0, 1e-2)
        loss.backward()
        return [loss.detach(), torch.tensor(numbers["z_loss"]), *(p.grad.clone() for p in model.parameters())]

    want = loss_and_gradients()
    plugged = plug(model, "triton")
    assert spares_logits(model)
    monkeypatch.setattr(model.lm_head, "forward", lambda x: pytest.fail("the head made logits"))
    mine = loss_and_gradients()
    plugged.remove()
    assert not spares_logits(model)
    for x, y in zip(mine, want, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-5, atol=1e-6)
