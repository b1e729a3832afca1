"""Graphics cards and clusters of them: `512xH100-80GB` is a cluster, launch/cards.yaml has the cards."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

CARDS = Path(__file__).with_name("cards.yaml")


@dataclass(frozen=True)
class Card:
    """What one card can do, as published; rates in units of 10^9 bytes and 10^12 operations a second."""

    name: str
    arch: str
    memory_gib: float
    bf16_tflops: float
    float8_tflops: float
    memory_gb_per_s: float
    nvlink_gb_per_s: float
    network_gb_per_s: float
    watts: float
    per_machine: int
    reachable: float
    flash2: float
    flash3: float
    triton: float


@dataclass(frozen=True)
class Cluster:
    """`gpus` cards in machines of `card.per_machine`; fewer than that are one machine."""

    gpus: int
    card: Card

    @property
    def per_machine(self) -> int:
        return min(self.gpus, self.card.per_machine)

    def __str__(self) -> str:
        return f"{self.gpus}x{self.card.name}"


def read_cards() -> dict[str, Card]:
    """Return every card of launch/cards.yaml by name."""
    tree = yaml.safe_load(CARDS.read_text(encoding="utf-8"))
    return {name: Card(name=name, **fields) for name, fields in tree.items()}


def parse_cluster(text: str) -> Cluster:
    """Read COUNTxCARD. Raises ValueError, one line, for a wrong form, an unknown card or a broken machine."""
    cards = read_cards()
    found = re.fullmatch(r"(\d+)x(.+)", text.strip())
    if found is None:
        raise ValueError(f"--gpus: {text!r} is not COUNTxCARD; write 8xH100-80GB, for instance")
    count, name = int(found[1]), found[2]
    by_case = {known.lower(): known for known in cards}
    if name.lower() not in by_case:
        near = difflib.get_close_matches(name.lower(), by_case, 1, 0.4)
        hint = f"; did you mean {by_case[near[0]]}? Known" if near else "; known"
        raise ValueError(f"--gpus: card {name!r} is not known{hint}: {', '.join(cards)}")
    card = cards[by_case[name.lower()]]
    if count < 1:
        raise ValueError(f"--gpus: {text!r} has no card in it; write 1x{card.name} or more")
    if count > card.per_machine and count % card.per_machine:
        lower = count // card.per_machine * card.per_machine
        raise ValueError(
            f"--gpus: {count} is no multiple of the {card.per_machine} cards of a machine; take {lower} or "
            f"{lower + card.per_machine}"
        )
    return Cluster(count, card)
