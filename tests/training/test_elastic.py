"""The canonical tree: one order of addition for every power of two of ranks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shipyard.training.batches import accumulation, tree_block, tree_merges
from shipyard.training.loop import identity
from shipyard.training.ranks import _fix_arithmetic
from shipyard.training.recipe import parse_recipe


def added_up(leaves: int, world_size: int) -> str:
    """The sum of all leaves as an expression, made as the ranks make it."""
    pieces = []
    for rank in range(world_size):
        stack: list[str] = []
        block = tree_block(leaves, world_size, rank)
        for leaf, merges in zip(block, tree_merges(max(1, len(block))), strict=False):
            stack.append(str(leaf))
            for _ in range(merges):
                right = stack.pop()
                stack[-1] = f"({stack[-1]}+{right})"
            assert len(stack) <= len(block).bit_length() + 1
        assert len(stack) == (1 if len(block) else 0)
        pieces.append(stack[0] if stack else "")
    while len(pieces) > 1:
        pairs = zip(pieces[::2], pieces[1::2], strict=True)
        pieces = [f"({left}+{right})" if left and right else left + right for left, right in pairs]
    return pieces[0]


@given(st.integers(1, 70), st.integers(0, 5))
def test_the_order_of_additions_depends_on_the_micro_batches_alone(leaves: int, doublings: int) -> None:
    world_size = 1 << doublings
    assert added_up(leaves, world_size) == added_up(leaves, 1)
    blocks = [tree_block(leaves, world_size, rank) for rank in range(world_size)]
    assert [leaf for block in blocks for leaf in block] == list(range(leaves))
    assert max(map(len, blocks)) == accumulation(leaves, 1, world_size)


def test_odd_world_sizes_and_other_engines_are_refused_in_a_line() -> None:
    with pytest.raises(ValueError, match=r"power of two, not 6; start 4"):
        _fix_arithmetic(6)
    with pytest.raises(ValueError, match=r"parallel.engine: deterministic: elastic"):
        recipe(parallel={"engine": "zero1"})


def test_the_micro_batch_belongs_to_the_run() -> None:
    """Only in elastic mode: elsewhere it is a cut like any other."""
    four, two = {"batch": {"micro": 4}}, {"batch": {"micro": 2}}
    assert identity(recipe(**four)) != identity(recipe(**two))
    assert identity(recipe(deterministic="off", **four)) == identity(recipe(deterministic="off", **two))


def recipe(**sections: object):
    tree = {"method": "sft", "steps": 1, "deterministic": "elastic", "model": {"name": "m"}, "data": {"train": "x"}}
    return parse_recipe({**tree, **sections})
