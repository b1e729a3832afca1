"""Group-relative policy optimization (Shao et al. 2024) on verifiable tasks, with sampling that resumes exactly.

A *window* is one set of rollouts and the `grpo.inner_steps` optimizer steps taken on it. Questions and random numbers
are functions of (seed, window), and a checkpoint inside a window carries the rollouts, so a run killed there goes on
with the same ones (TRL 1.16 rolls again and repeats prompts).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .batches import collate
from .chat import ChatEncoder
from .loss import clipped_policy_loss, kl_to_reference, target_log_probs
from .method import Method, device_of
from .ranks import Ranks
from .recipe import Recipe
from .reference import Reference
from .rollout import Reply, generate
from .tasks import Question, Task


@dataclass(frozen=True)
class Rollout:
    """A sampled reply with its prompt: ids, the reply's mask, sampling log-probabilities, reward and advantage."""

    ids: np.ndarray
    mask: np.ndarray
    log_probs: np.ndarray
    reward: float
    advantage: float


class GroupRelativeTuning(Method[Rollout]):
    """Items are rollouts; the denominator is the number of sampled tokens in the global batch."""

    rows = 0

    def __init__(self, recipe: Recipe, ranks: Ranks, policy: nn.Module, tokenizer, reference: Reference | None) -> None:
        if recipe.batch.size % recipe.grpo.group_size:
            raise ValueError(
                f"batch.size: {recipe.batch.size} replies do not make whole groups of grpo.group_size="
                f"{recipe.grpo.group_size}; use a multiple"
            )
        self.recipe, self.ranks, self.policy, self.reference = recipe, ranks, policy, reference
        self.tokenizer, self.encoder = tokenizer, ChatEncoder(tokenizer)
        self.task = Task(recipe.data.train, recipe.grpo.task_options, recipe.seed)
        self.window, self.rollouts = -1, []

    def batch(self, step: int) -> list[Rollout]:
        """The global batch of a step: sampled when its window begins. Collective."""
        window = step // self.recipe.grpo.inner_steps
        if window != self.window:
            self.window, self.rollouts = window, self._sample(window)
        return self.rollouts

    def useful(self, items: Sequence[Rollout]) -> list[Rollout]:
        """Rollouts that move the policy. A group of equal rewards has advantage zero: without a KL term its gradient is
        exactly zero, so it is counted in every denominator and computed nowhere."""
        return list(items) if self.recipe.grpo.beta else [item for item in items if item.advantage != 0.0]

    def totals(self, items: Sequence[Rollout]) -> dict[str, float]:
        """Denominators and counts over the global batch."""
        return {
            "tokens": float(sum(len(item.ids) for item in items)),
            "supervised": float(sum(int(item.mask.sum()) for item in items)),
            "rollouts": float(len(items)),
        }

    def summary(self, items: Sequence[Rollout]) -> dict[str, float]:
        """Numbers of the global batch that need no forward pass."""
        return {
            "reward": float(np.mean([item.reward for item in items])),
            "correct": float(np.mean([item.reward >= 1.0 for item in items])),
            "reply_tokens": float(np.mean([int(item.mask.sum()) for item in items])),
        }

    def loss(
        self, model: nn.Module, items: Sequence[Rollout], totals: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, float]]:
        """This micro-batch's part of the global loss, and its part of every logged number."""
        settings = self.recipe.grpo
        batch = collate(items, self.recipe.batch.packing).to(device_of(model))
        logp_N = target_log_probs(model, batch, settings.temperature)
        if not items:
            return logp_N.sum() * 0.0, {"loss": 0.0, "clipped": 0.0}
        device = logp_N.device
        old_N = torch.from_numpy(np.concatenate([item.log_probs for item in items])).to(device)
        if settings.inner_steps == 1:  # on policy: the ratio is exactly one, whatever the sampler's rounding was
            old_N = logp_N.detach()
        advantage_N = torch.tensor([item.advantage for item in items], device=device)[batch.row_N]
        loss_N, clipped_N = clipped_policy_loss(logp_N, old_N, advantage_N, settings.clip_low, settings.clip_high)
        if settings.beta:
            assert self.reference is not None
            loss_N = loss_N + settings.beta * kl_to_reference(
                logp_N, self.reference.log_probs(batch, settings.temperature)
            )
        loss = loss_N.sum() / totals["supervised"]
        return loss, {"loss": float(loss.detach()), "clipped": float(clipped_N.sum()) / totals["supervised"]}

    def prompt(self, question: Question) -> list[int]:
        """Ids that ask a question, the system turn of the recipe before it."""
        return question_prompt(self.encoder, self.recipe, question)

    def _sample(self, window: int) -> list[Rollout]:
        settings, seed = self.recipe.grpo, self.recipe.seed
        groups = self.recipe.batch.size // settings.group_size
        numbers = [window * groups + group for group in range(groups)]
        questions = [self.task.question(number) for number in numbers]
        prompts = [self.prompt(question) for question in questions]
        mine = range(self.ranks.rank, groups, self.ranks.world_size)
        # One prompt at a time where bits may not depend on who else is in the batch
        together = 1 if self.recipe.deterministic == "elastic" else groups
        sampled: list[list[Reply]] = []
        for part in (mine[start : start + together] for start in range(0, len(mine), together)):
            sampled += generate(
                self.policy, [prompts[group] for group in part], settings.max_new_tokens, self.encoder.end_ids,
                settings.temperature, [(seed, numbers[group]) for group in part], settings.group_size,
            )  # fmt: skip
        rows: list[list[int]] = []
        for group, replies in zip(mine, sampled, strict=True):
            for reply in replies:
                text = self.tokenizer.decode(reply.ids, skip_special_tokens=True)
                reward = self.task.score(questions[group], text)
                bits = np.asarray([reward, *reply.log_probs], np.float32).view(np.int32).tolist()
                rows.append([group, len(reply.ids), *bits, *reply.ids])
        gathered = [row for rank_rows in self.ranks.gather_rows(rows) for row in rank_rows]
        return _advantages(prompts, gathered, settings.scale_rewards)

    def state(self) -> dict[str, Tensor]:
        """The rollouts of an unfinished window."""
        if not self.rollouts:
            return {}
        return {
            "window": torch.tensor([self.window]),
            "lengths": torch.tensor([len(item.ids) for item in self.rollouts]),
            "ids": torch.from_numpy(np.concatenate([item.ids for item in self.rollouts])),
            "mask": torch.from_numpy(np.concatenate([item.mask for item in self.rollouts])),
            "log_probs": torch.from_numpy(np.concatenate([item.log_probs for item in self.rollouts])),
            "rewards": torch.tensor([[item.reward, item.advantage] for item in self.rollouts], dtype=torch.float64),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up the window that a checkpoint was written in."""
        if not state:
            return
        self.window, self.rollouts, at, logp_at = int(state["window"][0]), [], 0, 0
        ids, mask, log_probs = (state[name].numpy() for name in ("ids", "mask", "log_probs"))
        for length, (reward, advantage) in zip(state["lengths"].tolist(), state["rewards"].tolist(), strict=True):
            part = mask[at : at + length]
            count = int(part.sum())
            logp = log_probs[logp_at : logp_at + count]
            self.rollouts.append(Rollout(ids[at : at + length], part, logp, reward, advantage))
            at, logp_at = at + length, logp_at + count


def question_prompt(encoder: ChatEncoder, recipe: Recipe, question: Question) -> list[int]:
    """Ids of a question as the policy and the evaluation see it."""
    system = [{"role": "system", "content": recipe.data.system}] if recipe.data.system is not None else []
    return encoder.encode_prompt([*system, {"role": "user", "content": question.text}])


def _advantages(prompts: list[list[int]], rows: list[list[int]], scale: bool) -> list[Rollout]:
    """Group rows by prompt, in an order that does not depend on ranks; advantage = reward - mean, over std if asked."""
    groups: dict[int, list[tuple[float, np.ndarray, list[int]]]] = {group: [] for group in range(len(prompts))}
    for group, length, *rest in rows:
        floats = np.asarray(rest[: length + 1], np.int32).view(np.float32)
        groups[group].append((float(floats[0]), floats[1:].copy(), rest[length + 1 :]))
    rollouts = []
    for group, replies in groups.items():
        rewards = np.asarray([reward for reward, _, _ in replies])
        centred = rewards - rewards.mean() if np.ptp(rewards) else np.zeros_like(rewards)
        advantages = centred / (rewards.std(ddof=1) + 1e-4) if scale else centred
        for (reward, log_probs, ids), advantage in zip(replies, advantages.tolist(), strict=True):
            whole = np.asarray([*prompts[group], *ids], np.int32)
            mask = np.arange(len(whole)) >= len(prompts[group])
            rollouts.append(Rollout(whole, mask, log_probs, reward, float(advantage)))
    return rollouts
