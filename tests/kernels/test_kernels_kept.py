"""What the PyTorch path keeps for the backward pass, to the byte, and its gradients: they equal autograd's."""

from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from shipyard.kernels import kept
from shipyard.kernels.huggingface import plug, spares_logits
from shipyard.training.activations import recompute
from shipyard.training.batches import collate
from shipyard.training.dataset import Sample
from shipyard.training.lora import add_adapters
from shipyard.training.low_rank import Linear
from shipyard.training.recipe import Lora
from shipyard.training.sft import next_token_loss
from transformers import LlamaConfig, LlamaForCausalLM

DOCUMENTS = (5, 12, 3, 20)
WIDTH, BETWEEN, HEADS, GROUPS, HEAD, RANK = 48, 80, 4, 2, 16, 4


def llama(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=WIDTH, intermediate_size=BETWEEN, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, head_dim=HEAD,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def adapted(layers: int = 2, plugged: bool = True, as_written: bool = False) -> Any:
    """A Llama with adapters; `as_written`: as PEFT computes them."""
    model = llama(layers)
    if plugged:
        plug(model, "torch")
    peft = add_adapters(model, Lora(rank=RANK), seed=0)
    for layer in peft.modules():  # B starts at zero, which would hide A's gradient
        if type(layer) is Linear:
            up: Any = layer.lora_B["default"]
            torch.nn.init.normal_(up.weight, std=0.1)
            if as_written:
                del layer.forward
    return peft


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(0, 97, (1, sum(DOCUMENTS)), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits


def bytes_kept(model: torch.nn.Module) -> int:
    """Of what a forward pass leaves for the backward pass, weights aside; views of one tensor count once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage  # held, so that no other tensor gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits(model)
    return sum(storage.nbytes() for storage in found.values())


def test_a_layer_with_adapters_keeps_what_no_cheap_pass_makes_again() -> None:
    """Inputs and root mean squares of two norms, q, k, v, attention's output and its log-sum-exp, gate, up, and the
    small side of seven adapters: in Llama's proportions half of what autograd keeps."""
    layer = bytes_kept(adapted(layers=4)) - bytes_kept(adapted(layers=3))
    numbers = 2 * (WIDTH + 1) + (2 * HEADS + 2 * GROUPS) * HEAD + HEADS + 2 * BETWEEN + 7 * RANK
    assert layer == 4 * sum(DOCUMENTS) * numbers
    stock = bytes_kept(adapted(4, plugged=False, as_written=True)) - bytes_kept(adapted(3, False, as_written=True))
    assert stock > 1.5 * layer


def gradients(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = logits(model)
    out.float().log_softmax(-1)[..., 3].sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("adapters", [True, False])
def test_whole_models_have_autograds_gradients(adapters: bool) -> None:
    plain = adapted(plugged=False, as_written=True) if adapters else llama()
    wanted, wanted_gradients = gradients(plain)
    plugged = plug(plain, "torch")
    if adapters:
        got, mine = gradients(adapted())
    else:
        got, mine = gradients(plain)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert mine.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(mine[name], gradient, rtol=0, atol=3e-6 * largest, msg=name)
    plugged.remove()
    assert not [name for name, module in plain.named_modules() if name.endswith("norm") and "forward" in vars(module)]


@pytest.mark.parametrize("how", ["full", "selective"])
def test_checkpointed_blocks_keep_the_bits(how: Literal["full", "selective"]) -> None:
    model = adapted()
    wanted, wanted_gradients = gradients(model)
    plain = bytes_kept(model)
    recompute(model, how, compiled=False)
    model.enable_input_require_grads()
    got, mine = gradients(model)
    assert torch.equal(got, wanted)
    for name, gradient in wanted_gradients.items():
        assert torch.equal(mine[name], gradient), name
    assert how == "selective" or bytes_kept(model) < plain / 2


def stock_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_norm(dtype: torch.dtype, bar: float) -> None:
    """The same bits forward, autograd's gradient, and left^T x without x."""
    torch.manual_seed(0)
    x = torch.randn(2, 7, 48).mul(3).to(dtype).requires_grad_()
    weight, up = torch.rand(48).to(dtype).requires_grad_(), torch.randn(2, 7, 48).to(dtype)
    y, wanted = kept.norm(x, weight, 1e-5), stock_norm(x, weight, 1e-5)
    assert torch.equal(y, wanted)
    for mine, theirs in zip(
        torch.autograd.grad(y, (x, weight), up), torch.autograd.grad(wanted, (x, weight), up), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=bar, atol=bar)
    again = kept.Again.found(y)
    assert (again is not None) == (dtype == torch.float32)
    if again:
        left = torch.randn(14, 5)
        torch.testing.assert_close(again.outer(left, *again.of), left.T @ y.reshape(14, 48), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_swiglu_has_autograds_bits(dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(kept, "PIECE", 3 * 64)  # 14 rows, three at a time
    torch.manual_seed(0)
    gate, up = (torch.randn(2, 7, 64).to(dtype).requires_grad_() for _ in range(2))
    slope, left = torch.randn(2, 7, 64).to(dtype), torch.randn(14, 5).to(dtype)
    y, wanted = kept.swiglu(gate, up), F.silu(gate) * up
    assert torch.equal(y, wanted)
    for mine, theirs in zip(
        torch.autograd.grad(y, (gate, up), slope), torch.autograd.grad(wanted, (gate, up), slope), strict=True
    ):
        assert torch.equal(mine, theirs)
    again = kept.Again.found(y)
    assert again is not None
    assert torch.equal(again.outer(left, *again.of), left.T @ y.reshape(14, 64))


def test_joined_documents_of_several_rows() -> None:
    torch.manual_seed(0)
    pieces = [[torch.randn(1, length, 2, 8, requires_grad=True) for length in row] for row in ([3, 5], [8], [1, 1, 6])]
    y = kept.join(pieces)
    assert torch.equal(y, torch.cat([torch.cat(row, 1) for row in pieces]))
    again, left = kept.Again.found(y.reshape(3, 8, 16)), torch.randn(24, 5)
    assert again is not None
    torch.testing.assert_close(again.outer(left, *again.of), left.T @ y.reshape(24, 16))


def test_word_of_a_tensor_that_was_written_to_or_cut_otherwise_is_not_taken() -> None:
    x, weight = torch.randn(4, 6, requires_grad=True), torch.ones(6)
    assert kept.Again.found(kept.norm(x, weight, 1e-5)) is not None
    assert kept.Again.found(kept.norm(x, weight, 1e-5).mul_(2)) is None
    assert kept.Again.found(kept.norm(x, weight, 1e-5).reshape(2, 12)) is None
    assert kept.Again.found(kept.norm(x, weight, 1e-5).t()) is None
    with torch.no_grad():
        assert kept.Again.found(kept.norm(x, weight, 1e-5)) is None


@pytest.mark.parametrize("gradient_of_z", [True, False])
def test_frozen_heads_terms_have_autograds_gradient_without_logits(gradient_of_z: bool, monkeypatch) -> None:
    monkeypatch.setattr(kept, "LOGITS", 64 * 8)  # 50 rows in chunks of 8
    torch.manual_seed(0)
    x, head, ids = torch.randn(50, 16, requires_grad=True), torch.randn(64, 16), torch.randint(0, 64, (50,))
    up_logp, up_z = torch.randn(50), torch.randn(50) * gradient_of_z
    logits = x @ head.T
    wanted_logp, wanted_z = -F.cross_entropy(logits, ids, reduction="none"), logits.logsumexp(-1)
    (wanted,) = torch.autograd.grad((wanted_logp * up_logp + wanted_z * up_z).sum(), x)

    logp, log_z = kept.head_terms(x, head, ids)
    torch.testing.assert_close(logp, wanted_logp)
    torch.testing.assert_close(log_z, wanted_z)
    (got,) = torch.autograd.grad((logp * up_logp + log_z * up_z).sum(), x)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_adapters_train_without_logits(packing: bool, monkeypatch) -> None:
    """The loop's own loss, z-loss too, over a frozen head; one that trains makes logits."""
    rows = [np.random.default_rng(seed).integers(0, 97, length) for seed, length in enumerate(DOCUMENTS)]
    batch = collate([Sample("", ids, np.arange(len(ids)) % 3 != 0) for ids in rows], packing)
    results = []
    for plugged in (False, True):
        model = adapted(plugged=plugged)
        assert spares_logits(model) == plugged
        if plugged:
            head = model.get_base_model().lm_head
            monkeypatch.setattr(head, "forward", lambda x: pytest.fail("the head made logits"))
        loss, numbers = next_token_loss(model, batch, 7.0, 1e-2)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        results.append([loss.detach(), torch.tensor(numbers["z_loss"]), *gradients])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-4, atol=1e-6)
    whole = llama()
    plug(whole, "torch")
    assert not spares_logits(whole)
