"""Messages to prompts: what clients send, checked, and in the words of the checkpoint's template."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specbackend.errors import InvalidRequest
from specbackend.serving.calls import CallReader
from specbackend.serving.chat import check_messages, render_chat
from specbackend.serving.errors import Unsupported
from specbackend.serving.faces import LLM, VLLM
from specbackend.serving.protocol import Ready
from specbackend.tokenizer import Tokenizer
from tests.fakes import CONTEXT_LENGTH, END_ID, VOCAB_SIZE, FakeRequest, VllmRequest, save_byte_checkpoint

TEMPLATE = (
    "{% if tools %}[{% for t in tools %}{{ t.function.name }}{% endfor %}]{% endif %}{{ style }}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
    "{% if m.role == 'nobody' %}{{ raise_exception('no such role') }}{% endif %}"
    "{% if m.role == 'sum' %}{{ m.content + 1 }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LIMITS = Ready(CONTEXT_LENGTH, VOCAB_SIZE, [END_ID], num_draft_tokens=8)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = save_byte_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return Tokenizer(folder)


@pytest.fixture(params=[(FakeRequest, LLM), (VllmRequest, VLLM)], ids=["llm", "vllm_model"])
def read(request, tokenizer):
    kind, face = request.param
    return lambda **inputs: CallReader(tokenizer, LIMITS, face).read(kind(**inputs))


def user(content) -> dict:
    return {"role": "user", "content": content}


CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "\\u00e9"}'}}
CHAT = [user(" hi "), {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "3"}]
TOOLS = [{"type": "function", "function": {"name": "add"}}]


@pytest.mark.parametrize(
    ("messages", "inputs", "text"),
    [
        ([user("hi")], {}, "<user>hi<assistant>"),
        ([user("hi")], {"add_generation_prompt": False}, "<user>hi"),
        ([user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])], {}, "<user>a\nb<assistant>"),
        ([user("hi")], {"chat_template_kwargs": '{"style": "brief:"}'}, "brief:<user>hi<assistant>"),
        ([user("hi")], {"tools": json.dumps(TOOLS)}, "[add]<user>hi<assistant>"),
        ([user("hi")], {"tools": "[]"}, "<user>hi<assistant>"),
        (CHAT, {}, '<user>hi<assistant>add({"a": 1, "b": "é"})<tool>3<assistant>'),
        (
            [user("hi"), {**CHAT[1], "tool_calls": [{"function": {"name": "add", "arguments": '{"a": '}}]}],
            {},
            '<user>hi<assistant>add("{\\"a\\": ")<assistant>',
        ),
        (
            [user("hi"), {"role": "assistant", "content": "Well "}],
            {"continue_final_message": True},
            "<user>hi<assistant>Well",
        ),
    ],
)
def test_rendered_by_the_template(read, tokenizer, messages, inputs, text):
    call = read(messages=json.dumps(messages), exclude_input_in_output=False, **inputs)
    assert call.input_ids == tokenizer.encode(text, add_special_tokens=False)
    assert call.echo == text


@pytest.mark.parametrize(
    ("messages", "inputs", "message"),
    [
        ("[", {}, "messages: must be JSON of a list of messages"),
        ("[" * 100_000, {}, "messages: "),
        ("{}", {}, "messages: must be JSON of a list of messages"),
        ("[]", {}, "messages: is empty"),
        ('["hi"]', {}, "messages: message 0 must be an object with a role"),
        ('[{"content": "hi"}]', {}, "messages: message 0 must be an object with a role"),
        ('[{"role": "user"}]', {}, "messages: message 0 has no content"),
        ([user("hi"), user(5)], {}, "messages: message 1: content must be a string or a list of text parts"),
        ([user(["hi"])], {}, "messages: message 0: a text part must have a type and a text"),
        ([user([{"type": "text"}])], {}, "messages: message 0: a text part must have"),
        ([user("\ud800")], {}, "messages: holds half of a surrogate pair"),
        ([user("x" * 600)], {}, "messages: has 6"),
        ([user("x" * 1_000_000)], {}, "messages: has 1000"),
        ([{**CHAT[1], "tool_calls": [{}]}], {}, "messages: message 0: a tool call must have a function"),
        (
            [{**CHAT[1], "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
            {},
            "messages: must be JSON of message 0: a tool call's arguments",
        ),
        ([{**CHAT[1], "tool_calls": 5}], {}, "messages: message 0: tool_calls must be a list"),
        ([{"role": "nobody", "content": "hi"}], {}, "messages: cannot be put into the chat template: .*no such role"),
        ([{"role": "sum", "content": "hi"}], {}, "messages: cannot be put into the chat template"),
        ([user("hi")], {"tools": "5"}, "tools: must be JSON of a list"),
        ([user("hi")], {"tools": "[5]"}, "tools: must be objects"),
        ([user("hi")], {"tools": "[]" + " " * 100_000}, "tools: has 100002 bytes"),
        ([user("hi")], {"chat_template_kwargs": "{}" + " " * 100_000}, "chat_template_kwargs: has 100002 bytes"),
        ([user("hi")], {"chat_template_kwargs": "[]"}, "chat_template_kwargs: must be JSON of an object"),
        (
            [user("hi")],
            {"chat_template_kwargs": '{"self": 1, "tools": 2}'},
            "chat_template_kwargs: cannot set self, tools",
        ),
        (
            [user("hi")],
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message: contradicts add_generation_prompt",
        ),
        ([user("hi")], {"text_input": "hi"}, "messages: contradicts text_input"),
        ([user("hi")], {"input_ids": [1]}, "messages: contradicts input_ids"),
        (None, {"tools": "[]", "text_input": "hi"}, "tools: says nothing without messages"),
        (None, {"continue_final_message": False, "input_ids": [1]}, "continue_final_message: says nothing without"),
        (None, {}, "text_input: is required"),
    ],
)
def test_refused_by_name(read, messages, inputs, message):
    if messages is not None:
        inputs = {"messages": messages if isinstance(messages, str) else json.dumps(messages), **inputs}
    with pytest.raises(InvalidRequest, match="^" + message) as error:
        read(**inputs)
    assert not isinstance(error.value, Unsupported)


def test_images_are_refused_by_name(read):
    picture = {"type": "image_url", "image_url": {"url": "http://example.org/"}}
    with pytest.raises(Unsupported, match="messages: message 1 has a part of type image_url"):
        read(messages=json.dumps([user("hi"), user([{"type": "text", "text": "a"}, picture])]))


def test_without_a_template(tmp_path):
    folder = save_byte_checkpoint(tmp_path)
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InvalidRequest, match=r"^messages: .* the tokenizer has no chat template"):
        render_chat(Tokenizer(folder), [user("hi")], [], {})


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "tool_calls", "function", "type", "text"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(st.lists(ANY_JSON))
def test_whatever_is_in_a_list_is_messages_or_an_error_of_the_client(value):
    try:
        messages = check_messages(value)
    except InvalidRequest as error:
        assert error.field == "messages"
    else:
        assert all(isinstance(each["role"], str) and isinstance(each["content"], str) for each in messages)
