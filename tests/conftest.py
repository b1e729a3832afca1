"""Fixtures shared by all tests: a tiny real Llama with its own tokenizer, and the command line as a user runs it."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # beside other tests: threads that wait for a core by spinning starve them
    os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a two-layer Llama (fp32, fixed seed) with a 384-token BPE and a ChatML template."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials: list[str | AddedToken] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((ROOT / "LICENSE").read_text().splitlines(), trainer)  # a text that stays
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=2, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def chat_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSONL of 22 conversations of very different lengths: 22 rows in batches of 8 leave a ragged window of 6."""
    path = tmp_path_factory.mktemp("rows") / "chat.jsonl"
    rows = [
        {"messages": [
            {"role": "user", "content": f"Count to {number}, please." * (1 + number % 3)},
            {"role": "assistant", "content": " ".join(map(str, range(1, 1 + number * (1 + number % 4))))},
        ]}
        for number in range(1, 23)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


Shipyard = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def shipyard() -> Shipyard:
    """Run `shipyard ARGS` as a process; with ranks=N through `accelerate launch`. Returns what it printed."""

    def run(
        *args: str | Path, ranks: int = 0, timeout_s: float = 300, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "shipyard.launch.cli"]
        if ranks:
            command = [
                sys.executable, "-m", "accelerate.commands.launch", "--config_file",
                str(ROOT / "launch/accelerate/ranks.yaml"), "--num_processes", str(ranks), "--main_process_port", "0",
                "-m", "shipyard.launch.cli",
            ]  # fmt: skip
        done = subprocess.run(
            [*command, *map(str, args)], capture_output=True, text=True, timeout=timeout_s,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if check:
            assert done.returncode == 0, f"{' '.join(map(str, args))}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done

    return run


@pytest.fixture(scope="session")
def on_ranks() -> Callable[..., str]:
    """Run a script as so many ranks under torchrun; return what they printed."""

    def run(ranks: int, script: Path, *args: str | Path, restarts: int = 0, timeout_s: float = 1800) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
        done = subprocess.run(
            [*command, f"--max-restarts={restarts}", str(script), *map(str, args)],
            capture_output=True, text=True, timeout=timeout_s, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run
