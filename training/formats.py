"""What users have, made one thing: messages, prompt/completion, Alpaca, ShareGPT, preferences, columns and templates.

A row is recognised by its columns unless the recipe says what it is. Whatever does not fit (a wrong role, turns
out of order, a column missing, content that is no text) is a ValueError `file:line: what is wrong; remedy`. Columns
that a format does not use are fine.
"""

import json
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .quarantine import Row
from .recipe import Data

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    **{
        "human": "user",
        "gpt": "assistant",
        "function_call": "call",
        "observation": "tool",
        "function_response": "tool",
    },
    **{"tool_call": "call", "tool_response": "tool", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"},
    **{role: role for role in ROLES},
}
KEPT_KEYS = ("reasoning_content", "reasoning", "thinking", "tool_call_id", "name")
Turn = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages in the form chat templates read (role, content, tool_calls ...), and the tools offered."""

    source: str
    messages: tuple[Turn, ...]
    tools: list[Any] | None


@dataclass(frozen=True)
class Preference:
    """Two replies to one prompt; each is one or more turns, the first of them the assistant's."""

    source: str
    prompt: tuple[Turn, ...]
    chosen: tuple[Turn, ...]
    rejected: tuple[Turn, ...]
    tools: list[Any] | None


def check_templates(data: Data) -> None:
    """Refuse `data.prompt` and `data.completion` templates that no row could fill."""
    for name, template in (("data.prompt", data.prompt), ("data.completion", data.completion)):
        if template is not None:
            try:
                _template_parts(template)
            except ValueError as error:
                raise ValueError(f"{name}: {template!r} is no template: {error}") from None


def to_conversation(row: Row, data: Data) -> Conversation:
    """Read a row as a conversation. Raises ValueError `source: reason; remedy`."""
    try:
        turns, replaceable = _conversation_turns(row.values, data)
        if data.labels is not None:
            if not replaceable:
                raise ValueError(
                    "data.labels replaces a completion, and this row has turns; use data.prompt/completion"
                )
            turns[-1]["content"] = _label(turns[-1]["content"], data.labels)
        turns = _with_system(turns, _system(row.values, data))
        _check_order(turns)
        return Conversation(row.source, tuple(turns), _tools(row.values))
    except ValueError as error:
        raise ValueError(f"{row.source}: {error}") from None


def to_preference(row: Row, data: Data) -> Preference:
    """Read a row as a preference pair. Raises ValueError `source: reason; remedy`."""
    try:
        values = row.values
        for key in ("chosen", "rejected"):
            if values.get(key) is None and values.get(f"{key}_messages") is not None:
                values = {**values, key: values[f"{key}_messages"]}
        chosen, rejected = (_reply_turns(values, key) for key in ("chosen", "rejected"))
        if chosen[0]["role"] == "assistant" and rejected[0]["role"] == "assistant":
            prompt = _prompt_turns(values, data)
        else:  # whole conversations: what both begin with is the prompt
            if data.prompt is not None:
                raise ValueError("data.prompt makes the question, and chosen and rejected hold theirs; leave it out")
            shared = 0
            while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
                shared += 1
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if chosen == rejected:
            raise ValueError("chosen and rejected are the same, so there is nothing to prefer; remove the row")
        if not (chosen and rejected) or {chosen[0]["role"], rejected[0]["role"]} != {"assistant"}:
            raise ValueError("chosen and rejected must part at an assistant turn, after the same prompt; mend the row")
        prompt = _with_system(prompt, _system(values, data))
        for reply in (chosen, rejected):
            _check_order([*prompt, *reply])
        return Preference(row.source, tuple(prompt), tuple(chosen), tuple(rejected), _tools(values))
    except ValueError as error:
        raise ValueError(f"{row.source}: {error}") from None


def to_text(row: Row) -> str:
    """Read a row of format text: its column `text`. Raises ValueError `source: reason; remedy`."""
    text = row.values.get("text")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{row.source}: format text needs a column text with text in it; {_columns(row.values)}")
    return text


# --- formats ---


def _conversation_turns(values: Mapping[str, Any], data: Data) -> tuple[list[Turn], bool]:
    """Return the turns, and whether the last one is a completion that `data.labels` may replace."""
    has = {key for key, value in values.items() if value is not None}
    kind = data.format
    if data.prompt is not None:
        if data.completion is None:
            raise ValueError("data.completion: data.prompt is set, so say what the reply is, '{label}' for instance")
        return [_turn("user", _fill(data.prompt, values)), _turn("assistant", _fill(data.completion, values))], True
    if kind == "preference":
        raise ValueError("data.format: preference rows train with method dpo; use method: dpo, or another format")
    if kind == "messages" or (kind == "auto" and "messages" in has):
        return _turns(values, "messages"), False
    if kind == "sharegpt" or (kind == "auto" and "conversations" in has):
        return _turns(values, "conversations"), False
    if kind == "prompt_completion" or (kind == "auto" and {"prompt", "completion"} <= has):
        reply = _as_turns(values, "completion", "assistant")
        simple = isinstance(values.get("completion"), str)
        return [*_as_turns(values, "prompt", "user"), *reply], simple
    if kind == "alpaca" or (kind == "auto" and {"instruction", "output"} <= has):
        return [*_instruction_turns(values), _turn("assistant", _text(values, "output"))], True
    raise ValueError(
        "no format fits: messages, conversations, prompt + completion or instruction + output are looked for; "
        f"{_columns(values)}; name them, or give data.prompt and data.completion templates"
    )


def _prompt_turns(values: Mapping[str, Any], data: Data) -> list[Turn]:
    if data.prompt is not None:
        return [_turn("user", _fill(data.prompt, values))]
    for key in ("prompt", "conversations", "messages"):
        if values.get(key) is not None:
            return _as_turns(values, key, "user")
    if values.get("instruction") is not None:
        return _instruction_turns(values)
    raise ValueError(f"a preference row needs a prompt beside chosen and rejected; {_columns(values)}; add it")


def _reply_turns(values: Mapping[str, Any], key: str) -> list[Turn]:
    turns = _as_turns(values, key, "assistant")
    if not turns:
        raise ValueError(f"{key} is empty; give the reply")
    return turns


def _instruction_turns(values: Mapping[str, Any]) -> list[Turn]:
    """Alpaca's columns the way LLaMA-Factory joins them: history, then instruction, a newline and the input."""
    turns: list[Turn] = []
    history = values.get("history") or []
    for number, pair in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError(f"history[{number}] must be a pair of texts, question and answer; mend the row")
        turns += [_turn("user", pair[0]), _turn("assistant", pair[1])]
    question = _text(values, "instruction")
    if values.get("input") is not None and (extra := _text(values, "input")):
        question = f"{question}\n{extra}"
    return [*turns, _turn("user", question)]


def _as_turns(values: Mapping[str, Any], key: str, role: str) -> list[Turn]:
    """Read a column that holds a text (said by `role`), one message or a list of messages."""
    value = values.get(key)
    if isinstance(value, str):
        return [_turn(role, value)]
    return _turns({key: [value]} if isinstance(value, Mapping) else values, key)


def _turns(values: Mapping[str, Any], key: str) -> list[Turn]:
    items = values.get(key)
    if not isinstance(items, list | tuple):
        raise ValueError(f"{key} must be a list of messages, not {type(items).__name__}; {_columns(values)}")
    if not items:
        raise ValueError(f"{key} is empty; remove the row")
    turns: list[Turn] = []
    pending: list[str] = []  # ids of calls whose results have not come, in order
    for number, item in enumerate(items):
        try:
            turn = _message(item, len(turns))
        except ValueError as error:
            raise ValueError(f"{key}[{number}]: {error}") from None
        if turn.get("tool_calls"):
            pending = [call["id"] for call in turn["tool_calls"]]
        if turn["role"] == "tool" and pending:
            turn.setdefault("tool_call_id", pending.pop(0))
        turns.append(turn)
    return turns


def _message(item: Any, number: int) -> Turn:
    """Read one message, `role`/`content` or ShareGPT's `from`/`value`."""
    if not isinstance(item, Mapping):
        raise ValueError(f"a message is an object with role and content, not {type(item).__name__}")
    sharegpt = "role" not in item and "from" in item
    said = item.get("from" if sharegpt else "role")
    role = SHAREGPT_ROLES.get(said) if sharegpt and isinstance(said, str) else said
    if role not in (*ROLES, "call"):
        known = SHAREGPT_ROLES if sharegpt else ROLES
        raise ValueError(f"wrong role {said!r}; known: {', '.join(known)}")
    content = _content(item.get("value" if sharegpt else "content"))
    if role == "call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(content, number)}
    if role == "assistant" and item.get("weight", 1) == 0:
        raise ValueError("weight 0 asks not to learn this turn, which is not supported; put it in a row's prompt only")
    turn: Turn = {"role": role, "content": content}
    turn.update({key: item[key] for key in KEPT_KEYS if item.get(key) is not None})
    calls = item.get("tool_calls") or item.get("function_call")  # the second: OpenAI's older name, of one call
    if role == "assistant" and calls:
        turn["tool_calls"] = _calls(calls, number)
    elif content is None:
        raise ValueError(f"{role} has no content; give it a text (an empty one if so meant)")
    return turn


def _content(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in value):
        texts = [part.get("text", part.get("value")) for part in value]
        if all(isinstance(text, str) for text in texts):
            return "".join(texts)
    raise ValueError(f"content must be text (or parts of type text), not {_short(value)}")


def _calls(value: Any, number: int) -> list[dict[str, Any]]:
    """Read tool calls: OpenAI's list, or ShareGPT's JSON text of one call or several."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"a function call must be JSON with name and arguments, not {_short(value)}") from None
    calls = []
    for order, call in enumerate(value if isinstance(value, list | tuple) else [value]):
        inner = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise ValueError(f"a tool call needs a name and arguments, not {_short(call)}")
        given = {key for key, value in inner.items() if value is not None}
        if "arguments" not in given and (strange := given - {"name", "id", "type", "index"}):
            raise ValueError(f"a tool call has its values under arguments, not {min(strange)}; rename it")
        identity = call.get("id") or f"c{number:04d}{order:04d}"  # nine characters: Mistral's template takes no other
        function = {"name": inner["name"], "arguments": inner.get("arguments") or {}}
        calls.append({"id": identity, "type": "function", "function": function})
    return calls


def _tools(values: Mapping[str, Any]) -> list[Any] | None:
    tools = values.get("tools") or values.get("functions")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise ValueError(f"tools must be a JSON list of functions, not {_short(tools)}") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"tools must be a list of functions, not {_short(tools)}")
    return [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools]


# --- order ---


def _system(values: Mapping[str, Any], data: Data) -> str | None:
    """The row's column `system`, where no template names columns, or else what the recipe puts before all (an empty
    text too, which keeps a chat template from a system turn of its own)."""
    text = values.get("system") if data.prompt is None else None
    if text and not isinstance(text, str):
        raise ValueError(f"system must be text, not {_short(text)}")
    return text or data.system


def _with_system(turns: list[Turn], text: str | None) -> list[Turn]:
    return turns if text is None or (turns and turns[0]["role"] == "system") else [_turn("system", text), *turns]


def _check_order(turns: Sequence[Turn]) -> None:
    """System first, if at all; then the user; user and assistant take turns; results follow calls."""
    before = "start"
    for number, turn in enumerate(turns):
        role = turn["role"]
        follows = {
            "start": ("system", "user"),
            "system": ("user",),
            "user": ("assistant",),
            "assistant": ("user",),
            "call": ("tool",),
            "tool": ("assistant", "tool", "user"),
        }[before]
        if role not in follows:
            place = "at the start" if before == "start" else f"after {before}"
            raise ValueError(f"wrong order: turn {number} is {role} {place}; expected {' or '.join(follows)}")
        before = "call" if turn.get("tool_calls") else role


# --- columns ---


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def _text(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    if not isinstance(value, str):
        raise ValueError(f"column {key} must be text, not {_short(value)}; {_columns(values)}")
    return value


def _label(completion: str, labels: Mapping[str, str]) -> str:
    if completion not in labels:
        raise ValueError(f"data.labels has no {completion[:80]!r}; it has {', '.join(labels)}; add it")
    return labels[completion]


def _template_parts(template: str) -> list[tuple[str, str | None]]:
    parts = []
    for text, column, spec, conversion in string.Formatter().parse(template):
        if column is not None and (not column or set(column) & set(".[]") or spec or conversion):
            raise ValueError("only {column} is allowed, no attributes, indices, formats; write {{ for a brace")
        parts.append((text, column))
    return parts


def _fill(template: str, values: Mapping[str, Any]) -> str:
    """Fill `{column}` by the row's text or number. Names only: a row's data is never evaluated."""
    return "".join(
        text + ("" if column is None else _cell(values, column)) for text, column in _template_parts(template)
    )


def _cell(values: Mapping[str, Any], column: str) -> str:
    value = values.get(column)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"column {column} is {value}; give a number or a text")
    if value is None or not isinstance(value, str | int | float):
        raise ValueError(f"column {column} must be text or a number, not {_short(value)}; {_columns(values)}")
    return str(value)


def _columns(values: Mapping[str, Any]) -> str:
    return f"the row's columns are {', '.join(map(str, values)) or 'none'}"


def _short(value: Any) -> str:
    return "missing" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"
