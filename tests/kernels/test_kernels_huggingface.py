"""The plug: same numbers as the model's own code, documents apart, everything put back."""

import pytest
import torch
from shipyard.kernels import huggingface
from shipyard.kernels.documents import document_ends, packing_of, sdpa_by_bucket, sdpa_each
from shipyard.kernels.huggingface import plug
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

SMALL = dict(
    vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, head_dim=16,
)  # fmt: skip
DEEPSEEK = dict(
    SMALL, num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8,
    v_head_dim=16, first_k_dense_replace=2, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
    n_shared_experts=1, moe_intermediate_size=32, head_dim=8,
)  # fmt: skip
CONFIGS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=7),
    "deepseek_v3": lambda: DeepseekV3Config(**DEEPSEEK),
}


def build(name: str, dtype=torch.float64):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="sdpa").to(dtype).train()


def packed(lengths):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 97, (1, sum(lengths)), generator=generator)
    return ids, torch.cat([torch.arange(length) for length in lengths])[None]


def gradients(model, ids, positions):
    model.zero_grad()
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    logits.float().log_softmax(-1)[..., 3].sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_document_ends_from_positions():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1], [5, 6, 7, 8, 9, 10]])
    assert document_ends(positions) == [[3, 4, 6], [6]]


class CallsOfSdpa(torch.overrides.TorchFunctionMode):
    def __init__(self):
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.nn.functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("window", "causal", "calls"), [(None, True, 4), (5, True, 4), (None, False, 8)])
def test_documents_of_like_length_share_a_call(window, causal, calls):
    """What a GPU without kernels runs: the values and gradients of one call a document, in fewer calls. Lengths of a
    power of two, one off it, a single token; two rows; keys shared by heads, values of another width."""
    lengths = ([1, 16, 17, 15, 31, 32, 33], [65, 31, 16, 33])
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    torch.manual_seed(0)
    shapes = ((2, 4, 145, 8), (2, 2, 145, 8), (2, 2, 145, 6))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    packing = packing_of(positions, 2, 145, positions.device)
    results = []
    for attend in (sdpa_each, sdpa_by_bucket):
        with CallsOfSdpa() as counted:
            out = attend(packing, *leaves, None, 0.0, window, causal)
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    assert counted.count == calls
    for mine, each in zip(*results, strict=True):
        torch.testing.assert_close(mine, each, rtol=0, atol=1e-12)


def test_a_packing_is_read_once_and_anew_after_a_change():
    positions = torch.tensor([[0, 1, 2, 0]])
    first = packing_of(positions, 1, 4, positions.device)
    assert packing_of(positions, 1, 4, positions.device) is first
    positions[0, 2] = 0
    assert packing_of(positions, 1, 4, positions.device).ends == [[2, 3, 4]]
    assert packing_of(positions, 2, 4, positions.device).borders == [0, 2, 3, 4, 6, 7, 8]
    with torch.inference_mode():
        served = torch.tensor([[0, 1, 2, 0]])
        assert packing_of(served, 1, 4, served.device).ends == [[3, 4]]
        served[0, 2] = 0
        assert packing_of(served, 1, 4, served.device).ends == [[2, 3, 4]]


@pytest.mark.parametrize("name", CONFIGS)
def test_torch_path_equals_the_block_mask(name):
    """fp64 logits and every gradient of a packed row, against transformers' own T x T mask."""
    model = build(name)
    ids, positions = packed([5, 1, 12, 9])
    logits, grads = gradients(model, ids, positions)
    plugged = plug(model, "torch")
    assert plugged.path == "torch"
    assert sorted(plugged.parts) == ["attention", "loss", "rms_norm", "swiglu"]
    mine, my_grads = gradients(model, ids, positions)
    plugged.remove()
    torch.testing.assert_close(mine, logits, rtol=0, atol=1e-12)
    for key, grad in grads.items():
        torch.testing.assert_close(my_grads[key], grad, rtol=0, atol=1e-12, msg=key)
    assert model.config._attn_implementation == "sdpa"


def test_packed_documents_do_not_leak_even_with_mask_and_cache():
    """An all-ones mask or a cache makes transformers forget the packing; the plug does not."""
    model = build("llama").eval()
    ids, positions = packed([6, 9])
    plug(model)
    alone = model(input_ids=ids[:, 6:]).logits
    with torch.no_grad():
        for extra in ({"attention_mask": torch.ones_like(ids)}, {"use_cache": True}):
            both = model(input_ids=ids, position_ids=positions, **extra).logits
            torch.testing.assert_close(both[:, 6:], alone, rtol=0, atol=1e-12)


def test_padding_and_generation_still_work():
    model = build("mistral").eval()
    ids, _ = packed([14])
    batch = torch.cat([ids, ids.roll(3, 1)])
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    with torch.no_grad():
        before = model(input_ids=batch, attention_mask=mask).logits
        told = model.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
        plug(model)
        torch.testing.assert_close(model(input_ids=batch, attention_mask=mask).logits[mask.bool()], before[mask.bool()])
        again = model.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(told, again)


def test_batched_rows_with_their_own_documents():
    model = build("llama").eval()
    ids, positions = packed([8, 8])
    rows = torch.cat([ids, ids.flip(1)])
    both = torch.cat([positions, torch.cat([torch.arange(3), torch.arange(13)])[None]])
    with torch.no_grad():
        want = model(input_ids=rows, position_ids=both, use_cache=False).logits
        plug(model)
        torch.testing.assert_close(model(input_ids=rows, position_ids=both, use_cache=False).logits, want)


def test_loss_without_logits_equals_transformers():
    """Mean over the supervised tokens, `num_items_in_batch`, and every gradient."""
    model = build("qwen2")
    ids, positions = packed([9, 12])
    labels = ids.masked_fill(torch.arange(21) % 3 == 0, -100)
    for extra in ({}, {"num_items_in_batch": 40}):
        results = []
        for path in ("stock", "torch"):
            plugged = plug(model) if path == "torch" else None
            model.zero_grad()
            out = model(input_ids=ids, position_ids=positions, labels=labels, use_cache=False, **extra)
            out.loss.backward()
            results.append([out.loss.detach(), *(p.grad.clone() for p in model.parameters())])
            if plugged:
                assert out.logits is None
                plugged.remove()
            else:
                assert out.logits is not None
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-5, atol=1e-6)  # stock loss is fp32


def test_users_mistakes():
    with pytest.raises(ValueError, match="kernels: 'cuda', must be auto, torch or triton"):
        plug(build("llama"), "cuda")
    with pytest.raises(ValueError, match="use kernels: auto"):
        plug(torch.nn.Linear(2, 2), "torch")
    assert plug(torch.nn.Linear(2, 2)).parts == ()
    with pytest.raises(ValueError, match="kernels: triton, needs a GPU"):
        plug(build("llama"), "triton")


def test_auto_takes_the_kernels_only_where_a_card_has_run_them(monkeypatch):
    assert not huggingface.is_proven(torch.device("cpu"))
    assert plug(build("llama")).path == "torch"
    monkeypatch.setattr(huggingface, "is_proven", lambda device: True)
    assert plug(build("llama")).path == "triton"
    assert plug(build("llama"), "torch").path == "torch"
    assert plug(build("llama"), whole=False).path == "torch"
    monkeypatch.setattr(huggingface, "is_proven", lambda device: device.type == "cuda")
    assert plug(build("llama")).path == "torch"
    elsewhere = plug(build("llama"), device=torch.device("cuda", 1))  # its weights come there later
    assert elsewhere.path == "torch" if elsewhere.fault else elsewhere.path == "triton"
    assert torch.cuda.is_available() or elsewhere.fault.startswith("ends in ")  # the trial, which had no card
