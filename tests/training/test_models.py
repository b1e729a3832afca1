"""Every family from a config: documents stay apart in a pack, blocks recompute and compile to the same numbers."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from shipyard.kernels.huggingface import plug
from shipyard.training import loss as losses
from shipyard.training.batches import collate
from shipyard.training.dataset import Sample
from shipyard.training.float8 import product, require_hopper, use_float8
from shipyard.training.loop import train
from shipyard.training.models import blocks, has_bf16_units, load_model, prepare, require_apart, shape_config
from shipyard.training.recipe import Model, load_recipe
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

CPU = torch.device("cpu")
COMMON = {
    "vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
GATED = {**COMMON, "intermediate_size": 64, "num_key_value_heads": 2}
SHAPES = {
    "gpt2": {**COMMON, "model_type": "gpt2", "attn_pdrop": 0.1},
    "llama": {**GATED, "model_type": "llama"},
    "qwen2": {**GATED, "model_type": "qwen2"},
    "qwen3": {**GATED, "model_type": "qwen3", "head_dim": 16},
    "deepseek_v3": {
        **GATED, "model_type": "deepseek_v3", "num_key_value_heads": 4, "moe_intermediate_size": 16,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
}  # fmt: skip
FAMILIES = list(SHAPES)


@pytest.fixture(scope="module")
def shape(tmp_path_factory) -> Callable[[str], str]:
    """The path of a family's config."""
    folder = tmp_path_factory.mktemp("shapes")
    for family, tree in SHAPES.items():
        (folder / f"{family}.json").write_text(json.dumps(tree))
    return lambda family: str(folder / f"{family}.json")


def scratch(path: str, **knobs: object) -> Model:
    return Model.model_validate({"name": "scratch", "shape": path, "dtype": "float32", **knobs})


def documents() -> list[Sample]:
    numbers = np.random.default_rng(0)
    lengths = (17, 1, 30, 2, 9)
    return [Sample(f"{n}", numbers.integers(0, 384, n + 1).astype(np.int32), np.arange(n + 1) > 0) for n in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_document_says_what_it_says_alone(family: str, shape) -> None:
    """Through the loss that trains: log-probability of every target, alone, packed and padded."""
    model = load_model(scratch(shape(family)), trains_all=True, seed=3)
    with torch.no_grad():  # so that attention and positions matter as much as in a trained model
        for parameter in model.parameters():
            parameter.mul_(4.0)
    parts = plug(model).parts
    assert "attention" in parts
    rows = documents()
    with torch.no_grad():
        alone = torch.cat([losses.target_log_probs(model, collate([row], True)) for row in rows])
        packed, padded = (losses.target_log_probs(model, collate(rows, packing)) for packing in (True, False))
    assert (packed - alone).abs().max() < 2e-5
    assert (padded - alone).abs().max() < 2e-5
    shuffled = losses.target_log_probs(model, collate(rows[::-1], True)).detach()
    assert (shuffled.sort()[0] - alone.sort()[0]).abs().max() < 2e-5
    assert alone.std() > 0.5  # else nothing could be seen


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_positions_that_do_not_restart_would_be_seen(family: str, shape) -> None:
    model = load_model(scratch(shape(family)), trains_all=True, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
        plug(model)
        batch = collate(documents(), True)
        right = losses.target_log_probs(model, batch)
        batch.positions_BT.copy_(torch.arange(batch.positions_BT.shape[1])[None])
        assert (losses.target_log_probs(model, batch) - right).abs().max() > 0.1


OTHERS = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8, "num_local_experts": 4},
    "gemma2": {"head_dim": 8, "sliding_window": 4},
    "mixtral": {"num_local_experts": 4},
}


@pytest.mark.parametrize("family", list(OTHERS))
def test_families_whose_documents_see_each_other_are_not_packed(family: str, tiny_model: Path, tmp_path: Path) -> None:
    """transformers' own attention keeps documents apart in some families; recurrent layers, ALiBi and sinks do not."""
    shape = tmp_path / "shape.json"
    shape.write_text(json.dumps({**GATED, "tie_word_embeddings": False, **OTHERS[family], "model_type": family}))
    model = load_model(scratch(str(shape)), trains_all=True)
    if family in ("gemma2", "mixtral"):
        require_apart(model)
        return
    with pytest.raises(ValueError, match=rf"batch.packing: documents of one row see each other .* type {family}; set"):
        require_apart(model)
    tree = {
        "method": "sft", "steps": 1, "run_dir": str(tmp_path / "run"), "data": {"train": str(tmp_path / "rows.jsonl")},
        "model": {"name": "scratch", "shape": str(shape), "tokenizer": str(tiny_model), "dtype": "float32"},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    with pytest.raises(ValueError, match=r"batch.packing"):
        train(load_recipe(tmp_path / "recipe.yaml"))
    if family == "bloom":
        train(load_recipe(tmp_path / "recipe.yaml", ["batch.packing=false"]))


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({"vocab_size": 300}, r"model.tokenizer: it gives ids up to \d+, and the model knows 300; name the tokenizer"),
        (
            {"max_position_embeddings": 16},
            r"data.max_tokens: a document may have \d+ tokens, and the model has learned 16 positions",
        ),
    ],
)
def test_a_model_that_has_no_room_for_the_rows(knobs: dict, reason: str, tiny_model: Path, tmp_path: Path) -> None:
    """torch says `index out of range in self`."""
    own = {"n_embd": 32, "n_layer": 2, "n_head": 4, "model_type": "gpt2"}
    (tmp_path / "shape.json").write_text(json.dumps({**COMMON, **own, **knobs}))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "License", "completion": "the copyright owner " * 4}))
    tree = {
        "method": "sft", "steps": 1, "run_dir": str(tmp_path / "run"), "data": {"train": str(tmp_path / "rows.jsonl")},
        "model": {"name": "scratch", "shape": str(tmp_path / "shape.json"), "tokenizer": str(tiny_model)},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=reason):
        train(load_recipe(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize("family", ["opt", "gpt_bigcode"])
def test_no_family_draws_random_numbers(family: str, tmp_path: Path) -> None:
    """OPT and BigCode keep rates of dropout as numbers of their own."""
    shape = tmp_path / "shape.json"
    own = {"ffn_dim": 64, "word_embed_proj_dim": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    tree = {**COMMON, "tie_word_embeddings": False, **own, "model_type": family}
    shape.write_text(json.dumps(tree))
    model = load_model(scratch(str(shape)), trains_all=True)
    first, second = (losses.target_log_probs(model, collate(documents(), False)).detach() for _ in range(2))
    assert first.equal(second)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_from_scratch_trains_in_one_arithmetic(family: str, shape) -> None:
    """In training mode, without dropout, whole (no weight unset, a tied head tied), and with gradients everywhere."""
    model = load_model(scratch(shape(family)), trains_all=True)
    assert model.training
    assert all(module.p == 0 for module in model.modules() if isinstance(module, nn.Dropout))
    head = model.get_output_embeddings()
    assert head is not None
    assert head.weight is model.get_input_embeddings().weight
    batch = collate(documents(), True)
    first, second = (losses.target_log_probs(model, batch) for _ in range(2))
    assert first.equal(second)
    first.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2-124m", 124_439_808),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen3-0.6b", 596_049_920),
        ("deepseek-v3", 671_026_404_352),
    ],
)
def test_shapes_are_the_published_models(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape_config(name)))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


class Alive(TorchDispatchMode):
    """Knows every storage that operations made, and how many bytes of them are still held."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def bytes(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


def pass_of(path: str, how: str, compiled: bool = False) -> tuple[float, int, list[torch.Tensor]]:
    """Loss, bytes held for the backward pass, and gradients of one packed batch."""
    model = load_model(scratch(path), trains_all=True, seed=3)
    plug(model)
    prepare(model, scratch(path, activation_checkpointing=how, compile=compiled), CPU)
    batch, alive = collate(documents() * 3, True), Alive()
    if compiled:
        loss = losses.target_log_probs(model, batch).sum()
    else:
        with alive:
            loss = losses.target_log_probs(model, batch).sum()
    held = alive.bytes()
    loss.backward()
    return float(loss.detach()), held, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_changes_memory_and_nothing_else(family: str, shape) -> None:
    (loss, all_held, gradients), selective, full = (
        pass_of(shape(family), how) for how in ("none", "selective", "full")
    )
    for other, _, theirs in (selective, full):
        assert other == loss
        assert all(a.equal(b) for a, b in zip(gradients, theirs, strict=True))
    assert full[1] < 0.75 * selective[1] < 0.75 * 0.85 * all_held, (full[1], selective[1], all_held)


def test_what_hooks_do_in_a_block_is_no_part_of_it(shape) -> None:
    """ZeRO-3 gathers weights in hooks: at times when a block is computed again, and not the first time."""

    def gradients(also: Callable[[torch.Tensor], object]) -> list[torch.Tensor]:
        seen: set[nn.Module] = set()

        def hook(layer: nn.Module, *_) -> None:
            for _ in range(99 if layer in seen else 0):
                also(torch.ones(4, 4))
            seen.add(layer)

        model = load_model(scratch(shape("llama")), trains_all=True, seed=3)
        prepare(model, scratch(shape("llama"), activation_checkpointing="selective"), CPU)
        for block in blocks(model):
            block.get_submodule("self_attn.q_proj").register_forward_pre_hook(hook)
        losses.target_log_probs(model, collate(documents(), True)).sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for a, b in zip(gradients(lambda x: x.view(-1).add_(1)), gradients(lambda x: None), strict=True):
        assert a.equal(b)
    with pytest.raises(RuntimeError, match=r"aten\.mm"):
        gradients(lambda x: x @ x)  # not the block of the first time


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_blocks_say_the_same(family: str, shape) -> None:
    loss, _, gradients = pass_of(shape(family), "none")
    for how in ("none", "selective", "full"):
        other, _, theirs = pass_of(shape(family), how, compiled=True)
        assert other == pytest.approx(loss, rel=1e-6)
        assert max(float((a - b).abs().max()) for a, b in zip(gradients, theirs, strict=True)) < 1e-4


def test_selective_checkpointing_is_a_cut_like_any_other(tiny_model: Path, chat_rows: Path, tmp_path: Path) -> None:
    """Through the loop, from a checkpoint that transformers loads in evaluation mode: the same bits."""
    tree = {
        "method": "sft", "steps": 2, "model": {"name": str(tiny_model), "dtype": "float32"},
        "data": {"train": str(chat_rows)}, "batch": {"size": 8, "micro": 4}, "optim": {"lr": 1e-3},
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    assert load_model(Model(name=str(tiny_model)), trains_all=True).training
    logs = []
    for how in ("none", "selective"):
        run = train(
            load_recipe(tmp_path / "r.yaml", [f"run_dir={tmp_path / how}", f"model.activation_checkpointing={how}"])
        )
        logs.append([json.loads(line) for line in (run / "log.jsonl").open()])
    assert [step["loss"] for step in logs[0]] == [step["loss"] for step in logs[1]]
    assert [step["grad_norm"] for step in logs[0]] == [step["grad_norm"] for step in logs[1]]


def test_float8_is_near_and_does_not_look_at_neighbours(shape) -> None:
    """torch multiplies float8 on CPUs too. Row scales: a token's result is the same in any company."""
    torch.manual_seed(0)
    a_TK, b_NK = torch.randn(48, 64) * torch.logspace(-3, 3, 48)[:, None], torch.randn(32, 64)
    exact, found = a_TK @ b_NK.T, product(a_TK, b_NK).float()
    assert ((found - exact).norm(dim=1) / exact.norm(dim=1)).max() < 0.06  # each row, the smallest too
    assert product(a_TK[7:8], b_NK).equal(product(a_TK, b_NK)[7:8])

    model = load_model(scratch(shape("llama")), trains_all=True, seed=3)
    batch = collate(documents(), True)
    with torch.autocast("cpu", torch.bfloat16):
        losses.target_log_probs(model, batch).sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert use_float8(blocks(model)) == 14
    with torch.autocast("cpu", torch.bfloat16):
        losses.target_log_probs(model, batch).sum().backward()
    for name, gradient in wanted.items():
        grad = model.get_parameter(name).grad
        assert grad is not None
        error = float((grad - gradient).norm() / gradient.norm())
        assert error < 0.12, (name, error)
        assert error > 1e-4 or "lm_head" in name or "norm" in name, name


def test_float8_is_refused_without_hopper(shape) -> None:
    with pytest.raises(ValueError, match=r"model\.float8: needs an H100 or newer .*no CUDA device; set it false"):
        require_hopper(CPU)
    model = load_model(scratch(shape("llama")), trains_all=True)
    with pytest.raises(ValueError, match="H100"):
        prepare(model, scratch(shape("llama"), float8=True), CPU)


def test_frozen_weights_are_kept_as_this_processor_multiplies_them(tiny_model, tmp_path):
    stored = load_model(Model(name=str(tiny_model)), trains_all=True).bfloat16()
    stored.save_pretrained(tmp_path / "half")
    frozen = load_model(Model(name=str(tmp_path / "half")), trains_all=False)
    assert frozen.dtype == (torch.bfloat16 if has_bf16_units() else torch.float32)
    assert all(
        torch.equal(ours.bfloat16(), theirs)
        for ours, theirs in zip(frozen.parameters(), stored.parameters(), strict=True)
    )


def test_float32_stays_float32(tiny_model):
    assert load_model(Model(name=str(tiny_model), dtype="float32"), trains_all=False).dtype == torch.float32


def test_a_copy_of_compiled_layers_computes_with_its_own_weights(tiny_model: Path) -> None:
    """The reference of DPO and the model that FSDP2 and ZeRO-3 write at the end are such copies."""
    from shipyard.training import recipe as recipes
    from shipyard.training.fsdp2 import put_weights, without_weights
    from shipyard.training.models import blocks, prepare
    from shipyard.training.reference import Reference
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_model)
    prepare(model, recipes.Model(name="tiny", compile=True), torch.device("cpu"))
    ids = torch.arange(8)[None]
    whole = without_weights(model)
    put_weights(whole, {name: torch.nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()})
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        wanted = model(ids).logits
        for copied in (Reference(model).copy, whole):
            assert copied is not None
            before = copied(ids).logits
            assert before.equal(wanted)
            kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
            for parameter in blocks(model)[0].parameters():
                parameter.zero_()
            assert copied(ids).logits.equal(before)
            for name, parameter in model.named_parameters():
                parameter.copy_(kept[name])
