"""llama.cpp in a child process: score token sequences through its C interface, or run its server.

A child, because a damaged GGUF file aborts the process that opens it. The library is the one inside `xllamacpp`; its C
symbols are called through ctypes, and the layout of its parameter structs is checked before use. Run as
`python -m shipyard.serving.llamacpp score REQUEST.json` or `... serve REQUEST.json` (internal).
"""

import ctypes
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

SCORE_TIMEOUT_S = 1800
START_TIMEOUT_S = 300
MAX_SEQUENCE = 512  # one physical batch, so that every position's logits come out of one call
# llama_context_params as int32 words: n_ctx, n_batch, n_ubatch, n_seq_max; n_threads and n_threads_batch at 7 and 8.
DEFAULT_WORDS = {0: 512, 1: 2048, 2: 512, 3: 1, 7: 4, 8: 4}
N_CTX, N_UBATCH, N_THREADS, N_THREADS_BATCH = 0, 2, 7, 8


def require_llamacpp() -> None:
    """Raise ValueError with the line that installs llama.cpp when it is not there."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise ValueError("engine: llama.cpp is not installed; pip install 'shipyard-llm[llamacpp]'")


@dataclass(frozen=True)
class ScoreRequest:
    """What to score: a GGUF file, token sequences to force through it, texts to tokenize, ids asked to end a turn."""

    gguf: str
    sequences: list[list[int]]
    texts: list[str]
    end_ids: list[int]
    threads: int


@dataclass(frozen=True)
class Scores:
    """llama.cpp's answers: `logits[i]` is (T_i, V) float32; `token_ids[i]` of text i; `ends[j]` for end_ids[j]."""

    logits: list[np.ndarray]
    token_ids: list[list[int]]
    ends: list[bool]


def last_error(log: str, fallback: str) -> str:
    """The line of a llama.cpp log that says what went wrong."""
    lines = [line.strip() for line in log.splitlines() if "rror" in line or "ASSERT" in line or "ailed" in line]
    return (lines[0] if lines else fallback)[:300]


def score(request: ScoreRequest) -> Scores:
    """Run one request in a child process. Raises ValueError when llama.cpp refuses the file."""
    require_llamacpp()
    with tempfile.TemporaryDirectory(prefix="shipyard-score-") as folder:
        path = Path(folder) / "request.json"
        path.write_text(json.dumps(asdict(request)), encoding="utf-8")
        command = [sys.executable, "-m", "shipyard.serving.llamacpp", "score", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SCORE_TIMEOUT_S)
        if done.returncode != 0:
            reason = last_error(done.stderr, f"exit code {done.returncode}")
            raise ValueError(f"gguf: llama.cpp cannot run {request.gguf}: {reason}")
        answer = json.loads(path.with_name("answer.json").read_text(encoding="utf-8"))
        flat = np.fromfile(path.with_name("logits.f32"), dtype=np.float32).reshape(-1, answer["vocab_size"])
    bounds = np.cumsum([len(ids) for ids in request.sequences])[:-1]
    return Scores(np.split(flat, bounds), answer["token_ids"], answer["ends"])


class _Blob(ctypes.Structure):
    """A parameter struct of llama.cpp, larger than any version's; it is always a call's last argument or its result."""

    _fields_ = (("words", ctypes.c_int32 * 128),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class Library:
    """One model loaded through llama.cpp's C interface. Only for a process of its own: bad files abort it."""

    def __init__(self, gguf: str, context: int, threads: int) -> None:
        spec = importlib.util.find_spec("xllamacpp.xllamacpp")
        assert spec is not None
        assert spec.origin is not None
        self.lib = ctypes.CDLL(spec.origin)
        pointer, int32 = ctypes.c_void_p, ctypes.c_int32
        self._declare("llama_model_default_params", _Blob, [])
        self._declare("llama_context_default_params", _Blob, [])
        self._declare("llama_model_load_from_file", pointer, [ctypes.c_char_p, _Blob])
        self._declare("llama_init_from_model", pointer, [pointer, _Blob])
        self._declare("llama_decode", int32, [pointer, _Batch])
        self._declare("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, int32])
        self._declare("llama_get_memory", pointer, [pointer])
        self._declare("llama_memory_clear", None, [pointer, ctypes.c_bool])
        self._declare("llama_model_get_vocab", pointer, [pointer])
        self._declare("llama_vocab_n_tokens", int32, [pointer])
        self._declare("llama_vocab_is_eog", ctypes.c_bool, [pointer, int32])
        flags = [ctypes.c_bool, ctypes.c_bool]
        self._declare("llama_tokenize", int32, [pointer, ctypes.c_char_p, int32, pointer, int32, *flags])
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(gguf.encode(), self.lib.llama_model_default_params())
        if not self.model:
            raise SystemExit("error: the file does not load")
        parameters = self.lib.llama_context_default_params()
        if any(parameters.words[at] != value for at, value in DEFAULT_WORDS.items()):
            raise SystemExit("error: xllamacpp lays out its parameters differently; install the pinned version")
        for at, value in ((N_CTX, context), (N_UBATCH, MAX_SEQUENCE), (N_THREADS, threads), (N_THREADS_BATCH, threads)):
            parameters.words[at] = value
        self.context = self.lib.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise SystemExit("error: no context can be made for this file")
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        self.vocab_size = int(self.lib.llama_vocab_n_tokens(self.vocab))

    def _declare(self, name: str, result: Any, arguments: list[Any]) -> None:
        function = getattr(self.lib, name)
        function.restype, function.argtypes = result, arguments

    def logits(self, ids: list[int]) -> np.ndarray:
        """Force `ids` through the model from an empty cache. Returns (T, V) float32 logits."""
        assert 0 < len(ids) <= MAX_SEQUENCE, len(ids)
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        tokens, wanted = (ctypes.c_int32 * len(ids))(*ids), (ctypes.c_int8 * len(ids))(*([1] * len(ids)))
        status = self.lib.llama_decode(self.context, _Batch(len(ids), tokens, None, None, None, None, wanted))
        if status != 0:
            raise SystemExit(f"error: llama_decode returned {status}")
        shape = (self.vocab_size,)
        rows = [np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, i), shape) for i in range(len(ids))]
        return np.stack(rows)

    def tokenize(self, text: str) -> list[int]:
        """Tokenize as a server does: with BOS where the model wants it, control tokens recognised."""
        raw = text.encode()
        room = len(raw) + 8
        out = (ctypes.c_int32 * room)()
        count = self.lib.llama_tokenize(self.vocab, raw, len(raw), out, room, True, True)
        return list(out[: max(count, 0)])

    def ends(self, token_id: int) -> bool:
        """Whether llama.cpp stops generating at this token."""
        return bool(self.lib.llama_vocab_is_eog(self.vocab, token_id))


def _score_here(path: Path) -> None:
    request = ScoreRequest(**json.loads(path.read_text(encoding="utf-8")))
    library = Library(request.gguf, MAX_SEQUENCE, request.threads)
    with path.with_name("logits.f32").open("wb") as file:
        for ids in request.sequences:
            library.logits(ids).astype(np.float32).tofile(file)
    answer = {
        "vocab_size": library.vocab_size,
        "token_ids": [library.tokenize(text) for text in request.texts],
        "ends": [library.ends(i) for i in request.end_ids],
    }
    path.with_name("answer.json").write_text(json.dumps(answer), encoding="utf-8")


@dataclass(frozen=True)
class ServerRequest:
    """How to run llama.cpp's server: `context` tokens for each of `slots` concurrent requests."""

    gguf: str
    context: int
    slots: int
    threads: int
    key: str


class LlamaServer:
    """llama.cpp's own HTTP server in a child process on 127.0.0.1, on a port the system picks, behind a key."""

    def __init__(self, request: ServerRequest) -> None:
        """Start it and wait until it answers. Raises ValueError with llama.cpp's reason when it does not come up."""
        require_llamacpp()
        if not Path(request.gguf).is_file():
            raise ValueError(f"model: no GGUF file at {request.gguf}; make one with shipyard export --to gguf")
        self._log: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        command = [sys.executable, "-m", "shipyard.serving.llamacpp", "serve", json.dumps(asdict(request))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, start_new_session=True
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        if not self.url.startswith("http://"):
            self.process.wait(START_TIMEOUT_S)
            self._log.seek(0)
            reason = last_error(self._log.read(), f"exit code {self.process.returncode}")
            raise ValueError(f"gguf: llama.cpp cannot serve {request.gguf}: {reason}")

    def alive(self) -> bool:
        """Whether the child is still running."""
        return self.process.poll() is None

    def stop(self) -> None:
        """End the child; it stops by itself also when its parent dies, for its input closes."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()


def _serve_here(request: ServerRequest) -> None:
    # A compiled module: it has no source or stubs in which a type checker could find its names.
    xllamacpp: Any = importlib.import_module("xllamacpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = request.gguf
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = 0
    parameters.n_parallel = request.slots
    parameters.n_ctx = request.context * request.slots  # llama.cpp divides it among the slots
    parameters.warmup = False
    parameters.ctx_shift = False
    parameters.ui = False
    parameters.endpoint_slots = False
    parameters.api_keys = [request.key]
    parameters.cpuparams.n_threads = request.threads
    parameters.cpuparams_batch.n_threads = request.threads
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    sys.stdin.read()  # until the parent closes it, or dies
    os._exit(0)  # the server's destructor waits for running generations; nobody is left to read them


def main(arguments: list[str]) -> None:
    """Entry point of the child process."""
    if arguments[0] == "score":
        _score_here(Path(arguments[1]))
    else:
        _serve_here(ServerRequest(**json.loads(arguments[1])))


if __name__ == "__main__":
    main(sys.argv[1:])
