"""A user's mistake becomes one line on stderr and an exit code; a bug keeps its traceback."""

import errno
import os
import sys

import typer

EXTRAS = {  # what brings a module that is missing
    "train": "torch transformers trl peft accelerate deepspeed bitsandbytes datasets safetensors gguf numpy",
    "serve": "fastapi uvicorn httpx openai",
    "llamacpp": "xllamacpp",
    "vllm": "vllm",
    "kernels": "triton",
    "evals": "matplotlib",
    "track": "tensorboard wandb",
    "data": "datasketch",
    "ray": "ray",
}


def extra_with(module: str) -> str | None:
    """The extra that installs a module, None if no extra does."""
    return next((extra for extra, modules in EXTRAS.items() if module in modules.split()), None)


def usage(error: typer.TyperException) -> str:
    """What was wrong with the command line, and where help is."""
    text = error.format_message()
    if not text:  # `shipyard` alone prints its help
        return ""
    text = " ".join(text.split()).rstrip(".")
    return text if "help" in text else f"{text}; see shipyard --help"


def os_error(error: OSError) -> str | None:
    """One line for what a user can mend, None for the rest."""
    name = error.filename or "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"disk: no space left while writing {name}; free some, or set another run_dir"
    if isinstance(error, FileNotFoundError):
        return f"file: {name} does not exist; check the path" if error.filename else str(error)
    if isinstance(error, PermissionError):
        return f"file: {name} may not be opened ({error.strerror}); check its owner and mode"
    if error.errno == errno.EADDRINUSE:
        return "port: another program listens on it; give another --port"
    return None


def mistake(message: str, code: int = 2) -> int:
    """Print the line, on one rank of a machine only; return the exit code."""
    if message and os.environ.get("LOCAL_RANK", "0") == "0":
        line = " ".join(message.split())
        sys.stderr.write(f"shipyard: error: {line}\n")
    return code
