"""LitGPT's own LoRA script, `litgpt.finetune.lora`, on the bench's rows. Runs in LitGPT's environment.

`python -m shipyard.evals.contestant_litgpt WORK.json STEPS.json`; only LitGPT, torch and `meter.py` are imported.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from .meter import Meter, leave


def tokenized_rows(work: dict[str, Any]) -> Any:
    """A LitGPT data module whose rows are tokenized already; its collator pads to the longest of a micro-batch."""
    from litgpt.data import DataModule
    from litgpt.data.base import get_sft_collate_fn

    rows = json.loads(Path(work["rows"]).read_text(encoding="utf-8"))
    samples = [
        {
            "input_ids": torch.tensor(row["input_ids"]),
            "labels": torch.tensor(row["labels"]),
            "token_counts": {"raw": len(row["input_ids"]), "raw_plus_prompt_template": len(row["input_ids"])},
        }
        for row in rows
    ]

    class Rows(DataModule):
        def connect(self, tokenizer=None, batch_size: int = 1, max_seq_length=None, **kwargs) -> None:
            self.batch_size = batch_size

        def train_dataloader(self) -> DataLoader:
            collate = get_sft_collate_fn(pad_id=work["padding_id"])
            shuffle = torch.Generator().manual_seed(work["seed"])
            return DataLoader(samples, batch_size=self.batch_size, shuffle=True, generator=shuffle, collate_fn=collate)  # pyright: ignore[reportArgumentType]

        def val_dataloader(self) -> DataLoader:
            collate = get_sft_collate_fn(pad_id=work["padding_id"])
            return DataLoader(samples[:1], batch_size=1, collate_fn=collate)  # pyright: ignore[reportArgumentType]

    return Rows()


def main() -> None:
    """Train as the work says and leave after the last step."""
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.finetune.lora import setup

    work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(work["threads"])
    Meter(Path(sys.argv[2]), work["padding_id"], lambda tokens: sum(tokens) >= work["tokens"], leave)
    precision = {"float32": "32-true", "bfloat16": "bf16-true"}[work["dtype"]]
    train = TrainArgs(
        save_interval=None, log_interval=1, global_batch_size=work["size"], micro_batch_size=work["micro"],
        lr_warmup_steps=1, epochs=1, max_seq_length=None,
    )  # fmt: skip
    rank, every = work["lora_rank"], True
    setup(
        Path(work["litgpt"]), out_dir=Path(work["folder"]) / "litgpt-out", precision=precision, devices=1, lora_r=rank,
        lora_alpha=work["lora_alpha"], lora_dropout=0.0, lora_query=every, lora_key=every, lora_value=every,
        lora_projection=every, lora_mlp=every, data=tokenized_rows(work), train=train,
        eval=EvalArgs(interval=10**6, max_new_tokens=1, max_iters=1, final_validation=False),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": work["lr"], "weight_decay": 0.0}},
        seed=work["seed"],
    )  # fmt: skip


if __name__ == "__main__":
    main()
