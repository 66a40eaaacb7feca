"""Tools and thoughts through the gateway. The demo model knows neither, so guides put them into its mouth."""

import json

import jsonschema
import openai
import pytest

from tests.gateway.conftest import MODEL, client_of, running

CITY = 'Zürich "北" 🙂'
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", CITY]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Foresees it.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
ASKED = {"model": MODEL, "messages": [{"role": "user", "content": "Rome?"}], "temperature": 0, "max_tokens": 100}
ARGUMENTS = {"city": CITY, "days": 2}
CALL = json.dumps({"name": "weather", "arguments": ARGUMENTS}, ensure_ascii=False)
SAID = {  # by each kind of model: one call
    "hermes": f"<tool_call>\n{CALL}\n</tool_call>",
    "qwen25": f"<tool_call>\n{CALL}\n</tool_call>",
    "llama3": json.dumps({"name": "weather", "parameters": ARGUMENTS}, ensure_ascii=False),
    "mistral": f"[TOOL_CALLS] [{CALL}]",
}


@pytest.fixture(scope="module", params=SAID)
def parser(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def with_parser(settings, parser):
    with running(settings, tool_call_parser=parser, reasoning_parser="qwen3") as url:
        yield client_of(url)


def ask(client, stream: bool, **changes) -> tuple[dict, str]:
    """The message and the reason to end, whichever way it comes."""
    answer = client.chat.completions.create(**{**ASKED, "stream": stream, **changes})
    if not stream:
        return answer.choices[0].message.model_dump(exclude_none=True), answer.choices[0].finish_reason
    message, reason = {}, None
    for chunk in answer:
        delta = chunk.choices[0].delta.model_dump(exclude_none=True)
        reason = chunk.choices[0].finish_reason or reason
        for name in ("content", "reasoning_content"):
            if delta.get(name):
                message[name] = message.get(name, "") + delta[name]
        for call in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if "id" in call:
                calls.append({**call, "function": {**call["function"], "arguments": ""}})
            assert call["index"] == len(calls) - 1
            calls[-1]["function"]["arguments"] += call["function"].get("arguments") or ""
    return message, reason


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("choice", ["required", "named"])
def test_a_call_that_must_be(client, choice, stream):
    """Without any parser: the guide makes the model write what is known."""
    named = {"type": "function", "function": {"name": "weather"}}
    changes = {"tools": TOOLS, "tool_choice": named if choice == "named" else choice, "parallel_tool_calls": False}
    message, reason = ask(client, stream, **changes)
    [call] = message["tool_calls"]
    assert reason == "tool_calls" and call["id"]
    assert not message.get("content")
    assert call["function"]["name"] == "weather" or choice == "required"
    schema = PARAMETERS if call["function"]["name"] == "weather" else {"type": "object", "maxProperties": 0}
    jsonschema.validate(json.loads(call["function"]["arguments"]), schema)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_call_of_the_models_own(with_parser, parser, stream):
    thought = "Rome it is."
    for before in ("", f"<think>\n{thought}\n</think>\n\n"):
        message, reason = ask(with_parser, stream, tools=TOOLS, extra_body={"choice": [before + SAID[parser]]})
        [call] = message["tool_calls"]
        assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("weather", ARGUMENTS)
        assert reason == "tool_calls"
        assert message.get("reasoning_content") == (thought if before else None)
        assert not message.get("content")


@pytest.mark.parametrize("change", [{"tool_choice": "none"}, {"tools": openai.NOT_GIVEN}], ids=["none", "no tools"])
def test_nothing_is_a_call_where_there_is_nothing_to_call(with_parser, parser, change):
    changes = {"tools": TOOLS, "extra_body": {"choice": [SAID[parser]]}, **change}
    message, reason = ask(with_parser, False, **changes)
    assert (message["content"], reason) == (SAID[parser], "stop")
    assert "tool_calls" not in message


def test_thoughts_may_stay_where_they_are(with_parser):
    text = "<think>\nRome\n</think>\nYes."
    extra = {"choice": [text], "separate_reasoning": False}
    assert ask(with_parser, False, extra_body=extra)[0]["content"] == text
    message, _ = ask(with_parser, False, extra_body={"choice": [text]})
    assert (message["reasoning_content"], message["content"]) == ("Rome", "Yes.")


def test_refusals(client):
    unknown = {"type": "function", "function": {"name": "nobody"}}
    for changes in ({"tools": TOOLS}, {"tools": TOOLS, "tool_choice": unknown}, {"tool_choice": "auto"}):
        with pytest.raises(openai.BadRequestError) as refusal:
            client.chat.completions.create(**ASKED, **changes)
        assert refusal.value.param == "tool_choice"
