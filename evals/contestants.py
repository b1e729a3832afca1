"""The trainers that `bench train` compares, each run in a process of its own: ours, Hugging Face's and TRL's.

`python -m shipyard.evals.contestants NAME WORK.json STEPS.json`. All get the same model, dtype, adapters, optimizer,
rows of token ids and labels, and number of rows in a step; all else is each trainer's default, but for activation
checkpointing, which is off everywhere.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from .meter import Meter, leave

CONTESTANTS = {
    "shipyard": "shipyard train, packed",
    "shipyard-one": "shipyard train, one row at a time",
    "hf": "HF Trainer, padded",
    "hf-one": "HF Trainer, one row at a time",
    "hf-flat": "HF Trainer, DataCollatorWithFlattening",
    "trl-pack": "TRL SFTTrainer, packing",
    "trl-pad": "TRL SFTTrainer, padded",
    "litgpt": "LitGPT finetune lora, padded",
}
"""Names on the command line, and in the table."""


OURS = ("shipyard", "shipyard-one")


def run_shipyard(work: dict[str, Any], steps_file: Path, micro: int) -> None:
    """The loop behind `shipyard train`. It is stopped as any run is, by SIGTERM, which ends it after the next step."""
    from ..training.pages import keep_pages

    keep_pages()
    from ..training.loop import train
    from ..training.recipe import load_recipe

    recipe = load_recipe(work["recipe"], [f"batch.micro={micro}"])
    stop = lambda: os.kill(os.getpid(), signal.SIGTERM)
    Meter(steps_file, work["padding_id"], lambda tokens: len(tokens) == work["steps"] - 1, stop)
    train(recipe)


def _model(work: dict[str, Any]) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, work["dtype"]) if work["lora_rank"] else torch.float32  # what trains is fp32, autocast
    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=dtype)
    if not work["lora_rank"]:
        return model
    adapters = LoraConfig(
        r=work["lora_rank"], lora_alpha=work["lora_alpha"], lora_dropout=0.0, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, adapters)


def _arguments(work: dict[str, Any], micro: int, rows_of_a_step: float) -> dict[str, Any]:
    """What both of Hugging Face's trainers are told."""
    return {
        "output_dir": str(Path(work["folder"]) / "hf-out"), "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": max(1, round(rows_of_a_step / micro)), "num_train_epochs": 1,
        "use_cpu": not torch.cuda.is_available(),
        "learning_rate": work["lr"], "lr_scheduler_type": "constant", "weight_decay": 0.0, "seed": work["seed"],
        "bf16": work["dtype"] == "bfloat16", "save_strategy": "no", "report_to": "none",
        "gradient_checkpointing": False, "disable_tqdm": True, "logging_steps": 1,
    }  # fmt: skip


def _rows(work: dict[str, Any]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(json.loads(Path(work["rows"]).read_text(encoding="utf-8")))


def run_hf(work: dict[str, Any], flat: bool, micro: int) -> None:
    """transformers.Trainer with the collator its users take: padding, or flattening into one row without padding.

    One row at a time needs neither, and a processor, unlike a GPU, hardly minds how short a forward pass is.
    """
    from transformers import (
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        DataCollatorWithFlattening,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(work["model"])
    tokenizer.pad_token_id = work["padding_id"]
    collator = DataCollatorWithFlattening() if flat else DataCollatorForSeq2Seq(tokenizer)
    arguments = TrainingArguments(**_arguments(work, micro, work["size"]))
    Trainer(_model(work), arguments, data_collator=collator, train_dataset=_rows(work)).train()


def run_trl(work: dict[str, Any], packing: bool) -> None:
    """TRL's SFTTrainer; packed, `pack_tokens` are one forward pass, and a step takes as many as hold its rows."""
    from transformers import AutoTokenizer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(work["model"])
    tokenizer.pad_token_id = work["padding_id"]
    micro, rows = work["micro"], float(work["size"])
    if packing:
        micro, rows = 1, work["size"] * work["tokens"] / len(_rows(work)) / work["pack_tokens"]
    arguments = SFTConfig(**_arguments(work, micro, rows), packing=packing, max_length=work["pack_tokens"])
    SFTTrainer(_model(work), arguments, train_dataset=_rows(work), processing_class=tokenizer).train()


def main() -> None:
    """Run the contestant named in the arguments."""
    name, work_file, steps_file = sys.argv[1:]
    work = json.loads(Path(work_file).read_text(encoding="utf-8"))
    torch.set_num_threads(work["threads"])
    if name in OURS:
        run_shipyard(work, Path(steps_file), micro=1 if name == "shipyard-one" else work["micro"])
        return
    Meter(Path(steps_file), work["padding_id"], lambda tokens: sum(tokens) >= work["tokens"], leave)
    if name in ("hf", "hf-one", "hf-flat"):
        run_hf(work, flat=name == "hf-flat", micro=1 if name == "hf-one" else work["micro"])
    else:
        assert name in ("trl-pack", "trl-pad")
        run_trl(work, packing=name == "trl-pack")


if __name__ == "__main__":
    main()
