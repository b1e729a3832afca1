"""Ids and masks of conversations, property-tested on five real chat templates and on awkward made ones."""

import copy
from datetime import date
from functools import cache, cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from shipyard.training.chat import ChatEncoder, Encoded
from shipyard.training.replies import Replies
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from tokenizers_for_tests import NAMES, tokenizer_for_tests
from transformers import PreTrainedTokenizerFast

SMOLLM2, LLAMA3, DEEPSEEK, QWEN3, MISTRAL = NAMES
GOLDEN = Path(__file__).parent.parent / "golden"
SPELLED = (
    "<|im_end|>", "<|im_start|>", "<|eot_id|>", "<|begin_of_text|>", "<｜User｜>", "<｜end▁of▁sentence｜>", "</s>",
    "<s>", "[/INST]", "[TOOL_CALLS]", "<tool_call>", "<tool_response>", "<|endoftext|>", "<｜begin▁of▁sentence｜>",
)  # fmt: skip
some = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=(HealthCheck.filter_too_much, HealthCheck.too_slow),
    derandomize=True,
)
every_template = pytest.mark.parametrize("name", NAMES)

plain_text = st.text(max_size=24)
reply_text = st.just("") | st.builds("{}{}".format, st.sampled_from("aZ<1é日🙂"), plain_text)  # no white space first
spelling_text = st.lists(st.one_of(st.sampled_from(SPELLED), st.text("ab \n", max_size=4)), min_size=1, max_size=5).map(
    "".join
)


@cache
def encoder_for(name: str) -> ChatEncoder:
    return ChatEncoder(tokenizer_for_tests(name))


def with_template(name: str, template: str) -> ChatEncoder:
    tokenizer = copy.copy(tokenizer_for_tests(name))
    tokenizer.chat_template = template
    return ChatEncoder(tokenizer)


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def conversations(asks: st.SearchStrategy[str], replies: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict]]:
    rounds = st.lists(st.tuples(asks, replies), min_size=1, max_size=3).filter(lambda r: any(b.strip() for _, b in r))
    return st.builds(
        lambda system, pairs: (
            ([turn("system", system)] if system is not None else [])
            + [turn(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
        ),
        st.none() | asks,
        rounds,
    )


def decode(name: str, ids: list[int]) -> str:
    return tokenizer_for_tests(name).decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def supervised(name: str, encoded: Encoded) -> list[str]:
    """The supervised runs, decoded."""
    runs = groupby(zip(encoded.ids, encoded.mask, strict=True), key=lambda pair: pair[1])
    return [decode(name, [token for token, _ in run]) for on, run in runs if on]


def expected_replies(name: str, messages: list[dict]) -> list[str]:
    """What each template makes of a plain reply, written down by hand."""
    replies = [message["content"] for message in messages if message["role"] == "assistant"]
    match name:
        case "tokenizer-llama3":
            return [f"{reply.strip()}<|eot_id|>" for reply in replies]
        case "tokenizer-deepseek-v3":
            return [f"{reply}<｜end▁of▁sentence｜>" for reply in replies]
        case "tokenizer-mistral-nemo":
            return [f"{reply}</s>" for reply in replies]
        case "tokenizer-qwen3":
            last = replies[-1].lstrip("\n")
            return [*(f"{reply}<|im_end|>" for reply in replies[:-1]), f"<think>\n\n</think>\n\n{last}<|im_end|>"]
    return [f"{reply}<|im_end|>" for reply in replies]


@every_template
def test_ids_are_the_librarys_where_nobody_spells_a_control_token(name: str) -> None:
    tokenizer, encoder = tokenizer_for_tests(name), encoder_for(name)

    @some
    @given(conversations(plain_text, reply_text))
    def check(messages: list[dict]) -> None:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        if name == MISTRAL and messages[0]["role"] == "system":  # it shows that turn to a server only
            asked = tokenizer.apply_chat_template(messages[:-1], tokenize=False)
            rendered = f"{asked}{messages[-1]['content']}</s>"
        assume(not any(token in "".join(m["content"] for m in messages) for token in tokenizer.get_added_vocab()))
        assert encoder.encode(messages).ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]

    check()


@every_template
def test_mask_is_each_reply_with_its_end_token(name: str) -> None:
    @some
    @given(conversations(plain_text, st.text("aé日 \n🙂<", max_size=12)))
    def check(messages: list[dict]) -> None:
        encoded = encoder_for(name).encode(messages)
        assert supervised(name, encoded) == expected_replies(name, messages)
        assert not encoded.mask[0]

    check()


@every_template
def test_prompt_is_a_prefix_and_the_reply_begins_behind_it(name: str) -> None:
    @some
    @given(conversations(plain_text | spelling_text, reply_text), st.text(" \n\t", max_size=3))
    def check(messages: list[dict], space: str) -> None:
        messages = [*messages[:-1], turn("assistant", f"{space}done")]
        encoded, prompt = encoder_for(name).encode(messages), encoder_for(name).encode_prompt(messages[:-1])
        assert encoded.ids[: len(prompt)] == prompt
        assert encoded.mask[len(prompt)]
        assert not encoded.mask[len(prompt) - 1]

    check()


@every_template
def test_spelled_control_tokens_stay_text(name: str) -> None:
    encoder = encoder_for(name)
    control = set(tokenizer_for_tests(name).get_added_vocab().values())

    @some
    @given(conversations(spelling_text, spelling_text))
    def check(messages: list[dict]) -> None:
        neutral = [turn(m["role"], "".join("x" if part else "" for part in [m["content"].strip()])) for m in messages]
        count = [sum(token in control for token in encoder.encode(m).ids) for m in (messages, neutral)]
        assert count[0] == count[1]
        text = decode(name, encoder.encode(messages).ids)
        assert all(m["content"].strip() in text for m in messages)

    check()


@every_template
def test_one_bos(name: str) -> None:
    tokenizer = tokenizer_for_tests(name)
    ids = encoder_for(name).encode([turn("user", f"{tokenizer.bos_token}hi"), turn("assistant", "yo")]).ids
    if tokenizer.bos_token and name != SMOLLM2:  # SmolLM2's bos is ChatML's <|im_start|>, which starts every turn
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] != ids[1]


def test_bos_of_the_tokenizer_is_added_if_the_template_writes_none() -> None:
    encoder = with_template(LLAMA3, "{% for m in messages %}{{ m.role + ': ' + m.content + '<|eot_id|>' }}{% endfor %}")
    ids = encoder.encode([turn("user", "hi"), turn("assistant", "yo")]).ids
    assert ids.count(128000) == 1
    assert ids[0] == 128000


class Marking(Replies):
    """Finds every reply by marks, which plain replies do not need."""

    def _plain_span(self, index: int) -> None:
        return None


class Comparing(Marking):
    """Finds every mark by comparing renderings, as for templates that look at the contents."""

    @cached_property
    def _marks(self) -> Any:
        marks = super()._marks
        return type(marks)(marks.messages, marks.owners, self._compare_each(marks.messages, marks.owners))


@every_template
@pytest.mark.parametrize("finder", [Marking, Comparing])
def test_every_way_finds_the_same_spans(name: str, finder: type[Replies], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_for(name)

    @some
    @given(conversations(reply_text | spelling_text, reply_text | spelling_text))
    def check(messages: list[dict]) -> None:
        expected = encoder.encode(messages)
        with monkeypatch.context() as patch:
            patch.setattr("shipyard.training.chat.Replies", finder)
            assert encoder.encode(messages) == expected

    check()


# --- tools ---

TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "<|im_end|>", "parameters": {"type": "object"}}}
]
CALL = {"id": "c00010000", "type": "function", "function": {"name": "add", "arguments": {"a": "</s> 1", "b": 2}}}
TOOL_TALK = [
    turn("system", "Be exact."),
    turn("user", "1 + 2 <｜tool▁calls▁begin｜>"),
    turn("assistant", "", tool_calls=[CALL]),
    turn("tool", "3 <|eot_id|>", tool_call_id="c00010000"),
    turn("assistant", "It is 3."),
    turn("user", "thanks"),
    turn("assistant", "Bye."),
]
TOOL_REPLIES = {
    QWEN3: [
        '<tool_call>\n{"name": "add", "arguments": {"a": "</s> 1", "b": 2}}\n</tool_call><|im_end|>',
        "It is 3.<|im_end|>",
        "<think>\n\n</think>\n\nBye.<|im_end|>",
    ],
    DEEPSEEK: [  # its template writes no end after a single call that has a result
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n"
        '```json\n{"a": "</s> 1", "b": 2}\n```<｜tool▁call▁end｜>',
        "It is 3.<｜end▁of▁sentence｜>",
        "Bye.<｜end▁of▁sentence｜>",
    ],
    MISTRAL: [
        '[TOOL_CALLS][{"name": "add", "arguments": {"a": "</s> 1", "b": 2}, "id": "c00010000"}]</s>',
        "It is 3.</s>",
        "Bye.</s>",
    ],
    LLAMA3: [
        '{"name": "add", "parameters": {"a": "</s> 1", "b": 2}}<|eot_id|>',
        "It is 3.<|eot_id|>",
        "Bye.<|eot_id|>",
    ],
}


def tool_encoder(name: str) -> ChatEncoder:
    return with_template(name, (GOLDEN / "llama3_tools.jinja").read_text()) if name == LLAMA3 else encoder_for(name)


@pytest.mark.parametrize("name", list(TOOL_REPLIES))
@pytest.mark.parametrize("as_text", [False, True])
def test_tool_calls_are_supervised_and_results_are_not(name: str, as_text: bool) -> None:
    call = copy.deepcopy(CALL)
    if as_text:
        call["function"]["arguments"] = '{"a": "</s> 1", "b": 2}'
    talk = [*TOOL_TALK[:2], turn("assistant", None if as_text else "", tool_calls=[call]), *TOOL_TALK[3:]]
    encoder = tool_encoder(name)
    tools = None if name == DEEPSEEK else TOOLS
    encoded = encoder.encode(talk, tools)
    assert supervised(name, encoded) == TOOL_REPLIES[name]
    assert ("add" in decode(name, encoder.encode_prompt(talk[:2], tools))) == bool(tools)
    prompt = encoder.encode_prompt(talk[:-1], tools)
    assert encoded.ids[: len(prompt)] == prompt


def test_what_the_template_does_not_show_is_refused() -> None:
    with pytest.raises(ValueError, match="does not show them"):
        encoder_for(DEEPSEEK).encode(TOOL_TALK, TOOLS)
    encoder = with_template(
        SMOLLM2, "{% for m in messages if m.role != 'system' %}{{ m.content + eos_token }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"messages\[0\]: the chat template leaves this turn out"):
        encoder.encode(TOOL_TALK[:2] + TOOL_TALK[-1:])


def test_a_call_that_the_template_ends_by_another_token() -> None:
    tools = [{"type": "function", "function": {"name": "eom"}}]
    encoded = tool_encoder(LLAMA3).encode(TOOL_TALK, tools)
    assert supervised(LLAMA3, encoded)[0].endswith('"b": 2}}<|eom_id|>')


def test_a_last_call_that_the_template_does_not_end_gets_eos() -> None:
    encoded = encoder_for(DEEPSEEK).encode(TOOL_TALK[:3])
    assert supervised(DEEPSEEK, encoded)[0].endswith("```<｜tool▁call▁end｜><｜end▁of▁sentence｜>")


def test_supervise_from_leaves_history_out() -> None:
    for name in NAMES:
        talk = [turn("user", "a"), turn("assistant", "one"), turn("user", "b"), turn("assistant", "two")]
        whole, last = encoder_for(name).encode(talk), encoder_for(name).encode(talk, supervise_from=3)
        assert whole.ids == last.ids
        assert supervised(name, last) == supervised(name, whole)[1:]


# --- templates that rewrite history, end nothing, hide replies ---


def test_reasoning_is_masked_as_rendered() -> None:
    talk = [
        *(turn("user", "a"), turn("assistant", "<think>\nwhy\n</think>\n\none")),
        *(turn("user", "b"), turn("assistant", "<think>\nhow\n</think>\n\ntwo")),
    ]
    assert supervised(QWEN3, encoder_for(QWEN3).encode(talk)) == [
        "one<|im_end|>",
        "<think>\nhow\n</think>\n\ntwo<|im_end|>",
    ]
    ids = encoder_for(QWEN3).encode(talk).ids
    assert tokenizer_for_tests(QWEN3).convert_tokens_to_ids("</think>") in ids


R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% else %}"
    "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)


def test_generation_prompt_that_history_does_not_show() -> None:
    encoder = with_template(DEEPSEEK, R1)
    talk = [turn("user", "a"), turn("assistant", "<b>one"), turn("user", "b"), turn("assistant", "<think>x</think>two")]
    assert supervised(DEEPSEEK, encoder.encode(talk)) == ["<b>one<｜end▁of▁sentence｜>", "two<｜end▁of▁sentence｜>"]


def test_eos_is_supplied_where_a_template_ends_nothing() -> None:
    template = (
        "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
    )
    talk = [turn("user", "a"), turn("assistant", "one"), turn("user", "b"), turn("assistant", "two")]
    encoded = with_template(SMOLLM2, template).encode(talk)
    assert supervised(SMOLLM2, encoded) == ["one\n\n", "two\n\n<|im_end|>"]


def test_template_that_looks_at_the_text() -> None:
    """Marks change what this template does, so renderings are compared instead."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.content == 'secret' %}{{ '(hm) ' * 20 }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    encoder = with_template(SMOLLM2, template)
    talk = [turn("user", "secret"), turn("assistant", ""), turn("user", "secret"), turn("assistant", "secret")]
    assert supervised(SMOLLM2, encoder.encode(talk)) == ["<|im_end|>", "(hm) " * 20 + "secret<|im_end|>"]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([turn("user", "hi")], "nothing to learn"),
        ([turn("user", "hi"), turn("assistant", " \n")], "nothing to learn"),
        ([turn("assistant", "hi")], "speaks first"),
        ([turn("user", "hi"), turn("assistant", "", tool_calls=[CALL])], "leaves this turn out"),
        ([turn("user", "\ud800"), turn("assistant", "yo")], "lone surrogate"),
        ([turn("user", "a", name=date(2026, 1, 2)), turn("assistant", "yo")], "hold what JSON has not: .* date"),
    ],
)
def test_refusals(messages: list[dict], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        encoder_for(SMOLLM2).encode(messages)


def test_a_template_that_refuses_is_quoted() -> None:
    with pytest.raises(ValueError, match=r"refuses the conversation: .*roles must alternate"):
        encoder_for(MISTRAL).encode([turn("user", "a"), turn("user", "b"), turn("assistant", "c")])


def test_private_use_characters_in_the_text_survive() -> None:
    text = "\ue000\ue001\ue002 \U000f0000<|im_end|>"
    encoded = encoder_for(SMOLLM2).encode([turn("user", text), turn("assistant", "\ue001<|im_end|>\ue000")])
    assert supervised(SMOLLM2, encoded) == ["\ue001<|im_end|>\ue000<|im_end|>"]
    assert f"user\n{text}<|im_end|>" in decode(SMOLLM2, encoded.ids)


def test_tokenizer_that_loses_spaces_is_refused() -> None:
    tokenizer = copy.deepcopy(tokenizer_for_tests(SMOLLM2))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    with pytest.raises(ValueError, match="loses the spaces"):
        ChatEncoder(tokenizer)


def metaspace_tokenizer() -> Any:
    """Llama 2's kind: the start of a text is marked by a space, and control tokens are pieces of the vocabulary too."""
    pieces = [("<unk>", 0.0), ("<s>", -1.0), ("</s>", -1.0), ("▁", -3.0), ("▁hi", -2.0), ("hi", -2.5)]
    pieces += [(character, -6.0) for character in "abcdefghijklmnopqrstuvwxyz<>/[]:"]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    backend.add_tokens([AddedToken("  ", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[inst]' + m.content + '[/inst]' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    return tokenizer


def test_vocabulary_that_marks_the_start_of_a_text() -> None:
    tokenizer = metaspace_tokenizer()
    encoder = ChatEncoder(tokenizer)
    talk = [turn("user", "hi  hi"), turn("assistant", "hi"), turn("user", "a"), turn("assistant", "b")]
    rendered = tokenizer.apply_chat_template(talk, tokenize=False)
    assert encoder.encode(talk).ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    spelled = encoder.encode([turn("user", "</s>hi<s>"), turn("assistant", "b")]).ids
    assert spelled.count(1) == spelled.count(2) == 1
