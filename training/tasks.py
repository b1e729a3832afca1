"""Verifiable tasks (reasoning-gym): question and verifier, a pure function of (name, options, seed, number)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PREFIX = "task:"
HELD_OUT_SEED = 0x5EED
"""Evaluation items come from another seed, and those whose question was trained on are left out (evals/tasks.py)."""


@dataclass(frozen=True)
class Question:
    """One item: what is asked, and what the verifier needs to judge an answer."""

    text: str
    entry: Mapping[str, Any]


class Task:
    """A reasoning-gym generator. Raises ValueError for an unknown name or option."""

    def __init__(self, name: str, options: Mapping[str, Any], seed: int) -> None:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        name = name.removeprefix(PREFIX)
        if name not in DATASETS:
            import difflib

            near = difflib.get_close_matches(name, list(DATASETS), n=1)
            raise ValueError(
                f"data.train: no task {name!r} in reasoning-gym; "
                + (f"did you mean {near[0]!r}?" if near else "see its gallery")
            )
        try:
            self._items = reasoning_gym.create_dataset(name, size=1 << 30, seed=seed, **options)
        except (TypeError, AssertionError, ValueError) as error:
            reason = " ".join(str(error).split()) or "an option is out of range"
            raise ValueError(f"grpo.task_options: {dict(options)} is refused by {name} ({reason})") from None

    def question(self, number: int) -> Question:
        """Item `number`."""
        entry = self._items[number]
        return Question(entry["question"], entry)

    def score(self, question: Question, answer: str) -> float:
        """The verifier's judgement of a reply, 0 to 1 (the verifiers give a little for an answer that parses)."""
        return float(self._items.score_answer(answer.strip(), entry=dict(question.entry)))
