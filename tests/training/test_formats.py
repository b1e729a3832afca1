"""What users have becomes one conversation; what does not fit is named with its place and a remedy."""

import json
from typing import Any

import pytest
from shipyard.launch.assets import resolve
from shipyard.training.formats import check_templates, to_conversation, to_preference, to_text
from shipyard.training.quarantine import Row
from shipyard.training.recipe import Data
from shipyard.training.rows import read_rows

ASK, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
SYSTEM = {"role": "system", "content": "Be brief."}
AUTO = Data(train="rows.jsonl")


def conversation(values: dict[str, Any], **data: Any) -> list[dict[str, Any]]:
    return list(to_conversation(Row("rows.jsonl:7", values), Data(train="rows.jsonl", **data)).messages)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"messages": [ASK, REPLY], "score": 0.5}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, REPLY]}, "messages"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}, "sharegpt"),
        ({"prompt": "Hi", "completion": "Yo"}, "prompt_completion"),
        ({"prompt": [ASK], "completion": [REPLY]}, "prompt_completion"),
        ({"instruction": "Hi", "input": "", "output": "Yo"}, "alpaca"),
        ({"instruction": "Hi", "output": "Yo", "input": None}, "alpaca"),
    ],
)
def test_formats_say_the_same(values: dict[str, Any], name: str) -> None:
    assert conversation(values) == conversation(values, format=name) == [ASK, REPLY]
    assert conversation(values, system="Be brief.") == [SYSTEM, ASK, REPLY]


def test_alpaca_joins_input_and_history() -> None:
    row = {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be brief.", "history": [["Hi", "Yo"]]}
    assert conversation(row) == [
        *(SYSTEM, ASK, REPLY),
        *({"role": "user", "content": "Add\n1 2"}, {"role": "assistant", "content": "3"}),
    ]


def test_own_system_turn_wins() -> None:
    assert conversation({"messages": [SYSTEM, ASK, REPLY]}, system="Other.") == [SYSTEM, ASK, REPLY]


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [ASK, REPLY]},
        {"prompt": "Hi", "completion": "Yo"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
    ],
)
def test_a_column_system_is_read_in_every_format(values: dict[str, Any]) -> None:
    assert conversation({**values, "system": "Be brief."}, system="Other.") == [SYSTEM, ASK, REPLY]
    for blank in ("", None):
        assert conversation({**values, "system": blank}) == [ASK, REPLY]
        assert conversation({**values, "system": blank}, system="") == [{"role": "system", "content": ""}, ASK, REPLY]
    with pytest.raises(ValueError, match="system must be text"):
        conversation({**values, "system": 3})


def test_sharegpt_tools() -> None:
    row = {
        "tools": json.dumps([{"name": "add", "parameters": {}}]),
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "Yo"},
        ],
    }
    read = to_conversation(Row("r:1", row), AUTO)
    assert read.tools == [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = {"id": "c00010000", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    assert list(read.messages) == [
        ASK,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "c00010000"},
        REPLY,
    ]
    again = {"messages": list(read.messages), "tools": read.tools}
    assert to_conversation(Row("r:1", again), AUTO) == read


def test_a_call_under_an_older_name() -> None:
    call = {"name": "add", "arguments": '{"a": 1}'}
    older, newer = ({"role": "assistant", "content": "", key: value} for key, value in
                    (("function_call", call), ("tool_calls", [{"function": call}])))  # fmt: skip
    assert conversation({"messages": [ASK, older]}) == conversation({"messages": [ASK, newer]})
    assert conversation({"messages": [ASK, older]})[1]["tool_calls"][0]["function"] == call


TEMPLATE = {"prompt": "Rate: {text} {{x}}", "completion": "{label}"}


def test_columns_and_labels() -> None:
    values = {"text": "fine {label}", "label": 1}
    assert [turn["content"] for turn in conversation(values, **TEMPLATE)] == ["Rate: fine {label} {x}", "1"]
    assert conversation(values, **TEMPLATE, labels={"1": "good"})[1]["content"] == "good"
    assert conversation({"prompt": "Hi", "completion": "y"}, labels={"y": "Yo"}) == [ASK, REPLY]


@pytest.mark.parametrize("template", ["{text.upper}", "{text[0]}", "{}", "{text!r}", "{text:>9}", "{text"])
def test_templates_name_columns_and_nothing_else(template: str) -> None:
    with pytest.raises(ValueError, match=r"data.prompt: .* is no template"):
        check_templates(Data(train="x", prompt=template, completion="{label}"))


def said(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": role} for role in roles]}


@pytest.mark.parametrize(
    ("values", "data", "reason"),
    [
        (said("user", "bot"), {}, r"messages\[1\]: wrong role 'bot'; known: system, user, assistant, tool"),
        ({"conversations": [{"from": "me", "value": "x"}]}, {}, r"conversations\[0\]: wrong role 'me'; known: human"),
        (said("user", "user", "assistant"), {}, "wrong order: turn 1 is user after user; expected assistant"),
        (said("assistant", "user"), {}, "wrong order: turn 0 is assistant at the start"),
        (said("user", "assistant", "tool"), {}, "wrong order: turn 2 is tool after assistant"),
        (said("user", "system"), {}, "wrong order"),
        ({"messages": []}, {}, "messages is empty"),
        ({"messages": "Hi"}, {"format": "messages"}, "messages must be a list of messages, not str"),
        ({"messages": ["Hi"]}, {}, r"messages\[0\]: a message is an object"),
        ({"messages": [{"role": "user", "content": 3}]}, {}, r"messages\[0\]: content must be text .* not int '3'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, {}, "content must be text"),
        ({"messages": [{"role": "user"}]}, {}, "user has no content"),
        ({"messages": [ASK, {**REPLY, "weight": 0}]}, {}, "weight 0 asks not to learn"),
        ({"messages": [ASK, {"role": "assistant", "tool_calls": [{"id": "x"}]}]}, {}, "a tool call needs a name"),
        (
            {"messages": [ASK, {"role": "assistant", "tool_calls": [{"name": "f", "parameters": {"a": 1}}]}]},
            *({}, "a tool call has its values under arguments, not parameters; rename it"),
        ),
        ({"messages": [ASK, REPLY], "tools": "[{"}, {}, "tools must be a JSON list"),
        ({"text": "a"}, {}, "no format fits: .* the row's columns are text; name them, or give data.prompt"),
        ({"text": "a"}, TEMPLATE, "column label must be text or a number, not missing; the row's columns are text"),
        ({"text": "a", "label": float("nan")}, TEMPLATE, "column label is nan"),
        ({"text": "a", "label": "2"}, {**TEMPLATE, "labels": {"1": "good"}}, "data.labels has no '2'; it has 1"),
        ({"instruction": "a", "output": 3}, {}, "column output must be text, not int '3'"),
        ({"messages": [ASK, REPLY]}, {"labels": {"Yo": "x"}}, "data.labels replaces a completion"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {"format": "preference"},
            "data.format: preference rows train with method",
        ),
    ],
)
def test_what_does_not_fit_is_named(values: dict[str, Any], data: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^rows.jsonl:7: (\w+\[\d\]: )?{reason}"):
        conversation(values, **data)


GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "Hi", "chosen": "good", "rejected": "bad"},
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "ignored", "chosen": [ASK, GOOD], "rejected": [ASK, BAD], "messages": [ASK, GOOD]},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {"instruction": "Hi", "input": "", "chosen": "good", "rejected": "bad"},
        {"chosen_messages": [ASK, GOOD], "rejected_messages": [ASK, BAD]},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD], "system": "Be brief."},
    ],
)
def test_preferences_say_the_same(values: dict[str, Any]) -> None:
    own = "system" in values
    pair = to_preference(Row("r:1", values), Data(train="x", system="Other." if own else "Be brief."))
    assert (pair.prompt, pair.chosen, pair.rejected) == ((SYSTEM, ASK), (GOOD,), (BAD,))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"chosen": "good", "rejected": "bad"}, "needs a prompt beside chosen and rejected"),
        ({"prompt": "Hi", "chosen": "same", "rejected": "same"}, "are the same, so there is nothing to prefer"),
        ({"prompt": "Hi", "chosen": "good"}, "rejected must be a list of messages, not NoneType"),
        ({"chosen": [ASK, GOOD], "rejected": [{**ASK, "content": "Ho"}, BAD]}, "must part at an assistant turn"),
        ({"prompt": [ASK, REPLY], "chosen": "good", "rejected": "bad"}, "wrong order"),
    ],
)
def test_preferences_that_do_not_fit(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^r:1: .*{reason}"):
        to_preference(Row("r:1", values), AUTO)


def test_a_template_does_not_ask_what_whole_conversations_ask() -> None:
    with pytest.raises(ValueError, match=r"r:1: data.prompt makes the question, and chosen and rejected hold theirs"):
        to_preference(Row("r:1", {"q": "Ho", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}), Data(prompt="{q}"))


def test_text() -> None:
    assert to_text(Row("r:1", {"text": "a"})) == "a"
    with pytest.raises(ValueError, match="r:1: format text needs a column text"):
        to_text(Row("r:1", {"content": "a"}))


def test_real_files() -> None:
    """Every row of three data sets as their makers ship them."""
    calls = [to_conversation(row, AUTO) for row in read_rows(str(resolve("asset:glaive-toolcall-demo"))).rows]
    assert len(calls) == 300
    assert sum(bool(turn.get("tool_calls")) for one in calls for turn in one.messages) == 211
    assert len([to_conversation(row, AUTO) for row in read_rows("asset:alpaca-en-demo").rows]) == 999
    pairs = [to_preference(row, AUTO) for row in read_rows("asset:dpo-en-demo").rows]
    assert len(pairs) == 300
    assert sum(pair.prompt[0]["role"] == "system" for pair in pairs) == 80
