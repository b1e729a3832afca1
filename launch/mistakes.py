"""A user's mistake becomes one line on stderr and an exit code; a bug keeps its traceback."""

import errno
import os
import sys
import time

import typer

from ..training.exit_code import EXIT_MISTAKE

SAYING_S = 10
"""Longer than ranks of one machine differ in time, at most."""
BAD_PATHS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EROFS, errno.ELOOP)
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


def line_of(error: Exception) -> str | None:
    """What to tell the user in one line; None for what is no mistake of theirs."""
    if isinstance(error, ModuleNotFoundError):
        missing = (error.name or "").split(".")[0]
        extra = extra_with(missing)
        return extra and f"{missing} is not installed; pip install 'shipyard-llm[{extra}]', then shipyard doctor"
    if isinstance(error, ValueError):
        return str(error) if type(error) is ValueError or isinstance(error, UnicodeError) else None
    return os_error(error) if isinstance(error, OSError) else None


def os_error(error: OSError) -> str | None:
    """One line for what a user can mend, None for the rest."""
    name = error.filename or "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"disk: no space left while writing {name}; free some, or set another run_dir"
    if isinstance(error, FileNotFoundError):
        return f"file: {name} does not exist; check the path" if error.filename else str(error)
    if isinstance(error, PermissionError):
        return f"file: {name} may not be opened ({error.strerror}); check its owner and mode"
    if error.errno in BAD_PATHS and error.filename:
        return f"file: {name} cannot be read or written ({error.strerror}); give another path"
    if error.errno == errno.EADDRINUSE:
        return "port: another program listens on it; give another --port"
    return None


def mistake(message: str, code: int = EXIT_MISTAKE) -> int:
    """Print the line, on one rank of a machine only; return the exit code.

    A launcher ends all ranks when one has ended, so the others wait for the first to say it, and speak if it does not:
    then it is theirs alone."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first and "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(SAYING_S)
        first = True
    if message and first:
        line = " ".join(message.split())
        sys.stderr.write(f"shipyard: error: {line}\n")
    return code
