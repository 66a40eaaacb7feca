"""The tokenizer without transformers says what transformers says."""

import json
import subprocess
import sys
import threading
import time
from copy import deepcopy
from functools import partial
from pathlib import Path

import jinja2
import pytest

from specbackend.errors import ConfigError
from specbackend.tokenizer import ChatTemplateError, Tokenizer
from tests.conftest import DEMO_TARGET
from tests.fakes import save_byte_checkpoint

CHAT = [{"role": "user", "content": "How many is 2 + 3? é€😀"}]


@pytest.fixture(scope="module")
def theirs():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO_TARGET)


@pytest.mark.parametrize("text", ["Hello world", " two  spaces", "é€😀", "<|user|>x<|end|>", "1+1=2\n"])
def test_encode_and_decode_equal_transformers(theirs, text):
    ours = Tokenizer(DEMO_TARGET)
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)


def test_other_threads_go_on_while_a_text_is_encoded():
    ours, text = Tokenizer(DEMO_TARGET), "the number of eggs " * 50_000
    thread = threading.Thread(target=ours.encode, args=(text,))
    thread.start()
    looks = 0
    while thread.is_alive():
        looks += 1
        time.sleep(0.001)
    assert looks > 10


def test_chat_template_equals_transformers(theirs):
    expected = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert Tokenizer(DEMO_TARGET).apply_chat_template(CHAT) == expected


def test_a_text_cannot_have_fewer_tokens_than_its_bytes_say(tmp_path):
    tokenizer = Tokenizer(DEMO_TARGET)
    text = "the number of eggs " * 50
    assert len(tokenizer.encode(text)) * tokenizer.max_token_bytes >= len(text.encode())


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"neither tokenizer\.json nor"):
        Tokenizer(tmp_path)
    folder = save_byte_checkpoint(tmp_path / "plain")
    (folder / "tokenizer_config.json").write_text("{}")
    assert not Tokenizer(folder).has_chat_template
    with pytest.raises(ConfigError, match="no chat template"):
        Tokenizer(folder).apply_chat_template(CHAT)


def with_template(folder, template: str | list) -> Tokenizer:
    (save_byte_checkpoint(folder) / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return Tokenizer(folder)


def test_template_with_a_syntax_error_is_refused_where_it_is_used(tmp_path):
    tokenizer = with_template(tmp_path, "{{ }")
    assert tokenizer.has_chat_template
    for use in (tokenizer.check_chat_template, lambda: tokenizer.apply_chat_template(CHAT)):
        with pytest.raises(ConfigError, match="chat template: unexpected"):
            use()


def test_files_that_cannot_be_read_are_named(tmp_path):
    for name in ("tokenizer_config.json", "tokenizer.json"):
        folder = save_byte_checkpoint(tmp_path / name)
        (folder / name).write_text("{broken")
        with pytest.raises(ConfigError, match=name):
            Tokenizer(folder)


@pytest.mark.parametrize(
    "template",
    [
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ messages[0].content }}{% endgeneration %}{{ x }}",
        "{{ messages | tojson(ensure_ascii=true, indent=2) }}",
        "{{ strftime_now('a %% b') }}",
    ],
)
def test_template_features_equal_transformers(tmp_path, theirs, template):
    expected = theirs.apply_chat_template(CHAT, chat_template=template, tokenize=False)
    assert with_template(tmp_path, template).apply_chat_template(CHAT) == expected


TEMPLATES = sorted((Path(__file__).parent / "data" / "chat_templates").glob("*.jinja"))
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'What it\'s like <outside> "now" é',
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "array", "items": {"type": "integer"}}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "description": "", "parameters": {"properties": {}}}},
]
CALL = {"name": "get_weather", "arguments": {"city": "Zürich", "days": [1, 2]}}
SYSTEM = {"role": "system", "content": " Be brief. "}
ROLES = ("system", "developer")
USER = {"role": "user", "content": "Weather?"}
CALLING = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "abc123def", "type": "function", "function": CALL}],
}
RESULT = {"role": "tool", "tool_call_id": "abc123def", "content": "7 degrees"}
ANSWER = {"role": "assistant", "content": "Cold: 7 degrees. ", "reasoning_content": "7 is cold"}
PARTS = {
    "role": "user",
    "content": [{"type": "text", "text": "Look: "}, {"type": "image"}, {"type": "text", "text": "!"}],
}
CONVERSATIONS = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nCold."}, USER],
    "tools": [USER, CALLING, RESULT, ANSWER, USER],
    "tools, system": [SYSTEM, USER, CALLING, RESULT, RESULT],
    "two calls": [USER, {**CALLING, "tool_calls": CALLING["tool_calls"] * 2}, RESULT],
    "answered": [USER, ANSWER],
    "answered in parts": [USER, {"role": "assistant", "content": [*PARTS["content"], {"type": "image"}]}],
    "parts": [PARTS],
    "bad roles": [USER, USER, {"role": "comment", "content": "aside"}],
    "null": [{"role": "user", "content": None, "name": None}, CALLING],
    "a mark": [USER, {"role": "assistant", "content": "CONTINUE END_OF_THE_FINAL_MESSAGE \n"}],
}
OPTIONS = [
    {},
    {"add_generation_prompt": False},
    {"add_generation_prompt": False, "continue_final_message": True},
    {"tools": TOOLS},
    {"tools": TOOLS, "tools_in_user_message": False, "date_string": "1 April 2026", "enable_thinking": False},
    {"tools": []},
    {"documents": [{"title": "A", "text": "B"}], "enable_thinking": True, "bos_token": "<s>"},
]


def text_or_none(render, *args, **options) -> str | None:
    """What is rendered; None if it is refused, by whichever error."""
    try:
        return render(*args, **options)
    except (ValueError, TypeError, jinja2.TemplateError):
        return None


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_templates_with_tools_equal_transformers(theirs, template, options):
    ours = Tokenizer(DEMO_TARGET, chat_template=template)
    theirs_of = partial(theirs.apply_chat_template, chat_template=template.read_text(), tokenize=False)
    texts = []
    for name, messages in CONVERSATIONS.items():
        before = deepcopy(messages)
        expected = text_or_none(theirs_of, messages, **{"add_generation_prompt": True, **options})
        try:
            texts.append(ours.apply_chat_template(messages, **options))
        except ChatTemplateError:
            texts.append(None)
        assert texts[-1] == expected, name
        assert messages == before
    assert any(texts)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_without_developers_gets_the_system(template):
    """As it stands the role would be refused, or its message left out without a word."""
    tokenizer = Tokenizer(DEMO_TARGET, template)
    said = [text_or_none(tokenizer.apply_chat_template, [{**SYSTEM, "role": role}, USER]) for role in ROLES]
    assert said[0] == said[1] and (said[0] is None or "Be brief." in said[0])


def test_a_template_that_knows_developers_gets_them(tmp_path):
    tokenizer = with_template(tmp_path, "{% for m in messages if m.role == 'developer' %}{{ m.content }}{% endfor %}")
    assert tokenizer.apply_chat_template([{"role": "developer", "content": "Be brief."}]) == "Be brief."


def test_the_tool_use_template_is_taken_when_there_are_tools(tmp_path, theirs):
    named = [{"name": name, "template": name} for name in ("rag", "tool_use", "default")]
    tokenizer = with_template(tmp_path / "config", named)
    folder = save_byte_checkpoint(tmp_path / "files")
    (folder / "chat_template.jinja").write_text("default")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tool_use")
    for each in (tokenizer, Tokenizer(folder)):
        assert each.apply_chat_template(CHAT) == "default"
        assert each.apply_chat_template(CHAT, tools=TOOLS) == each.apply_chat_template(CHAT, tools=[]) == "tool_use"
    given = Tokenizer(folder, chat_template="{{ 'given' }}")
    assert given.apply_chat_template(CHAT, tools=TOOLS) == "given"


def test_named_templates_without_a_default_are_none(tmp_path):
    tokenizer = with_template(tmp_path, [{"name": "rag", "template": "x"}])
    assert not tokenizer.has_chat_template
    with pytest.raises(ConfigError, match="no chat template"):
        tokenizer.check_chat_template()


def test_a_template_that_is_given_takes_the_place_of_the_checkpoints(tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages[0].content }}é")
    long_text = "{# " + 5000 * "x" + " #}\n{{ messages[0].content }}é"  # no path is so long
    for given in (path, str(path), "{{ messages[0].content }}é", long_text):
        assert Tokenizer(DEMO_TARGET, chat_template=given).apply_chat_template(CHAT) == CHAT[0]["content"] + "é"
    assert Tokenizer(save_byte_checkpoint(tmp_path / "x"), chat_template=path).has_chat_template
    with pytest.raises(ConfigError, match=r"chat_template: '.*gone\.jinja' is neither a file nor a template"):
        Tokenizer(DEMO_TARGET, chat_template=tmp_path / "gone.jinja")


def test_a_template_refuses_in_its_own_words(tmp_path):
    def refusal(template: str, **options) -> str:
        with pytest.raises(ChatTemplateError) as caught:
            Tokenizer(DEMO_TARGET, chat_template=template).apply_chat_template(CHAT, **options)
        return str(caught.value)

    continued = {"continue_final_message": True, "add_generation_prompt": False}
    assert refusal("{{ raise_exception('no such role') }}") == "chat template: no such role"
    assert refusal("{{ messages[1].role }}").startswith("chat template: list object has no element 1")
    assert refusal("{{ 1 + messages }}").startswith("chat template: TypeError: ")
    assert refusal("{{ 1 }}", continue_final_message=True) == (
        "chat template: continue_final_message and add_generation_prompt exclude each other"
    )
    assert "does not show the final message" in refusal("{{ 'x' }}", **continued)
    with pytest.raises(ChatTemplateError, match="no messages"):
        Tokenizer(DEMO_TARGET).apply_chat_template([])
    with pytest.raises(ChatTemplateError, match="no text to continue"):
        Tokenizer(DEMO_TARGET).apply_chat_template([{"role": "assistant"}], **continued)


@pytest.mark.parametrize(
    "trick",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__']['__base__'] }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ ('{0.__class__.__mro__}'|attr('format'))('') }}",
        "{{ '{x.__class__.__mro__}'.format_map({'x': ''}) }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.mro() }}",
        "{{ messages.append('more') }}",
        "{{ messages[0].update(role='system') }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{% include '/etc/hostname' %}",
        "{% import 'os' as os %}",
    ],
)
def test_templates_run_in_a_sandbox(trick):
    messages = deepcopy(CHAT)
    with pytest.raises(ChatTemplateError):
        print(Tokenizer(DEMO_TARGET, chat_template=trick).apply_chat_template(messages, tools=TOOLS))
    assert messages == CHAT


def test_the_stub_side_does_not_import_torch():
    """Torch in Triton's process would cost 4 s and 260 MB, and fight the engine for the cores."""
    modules = "specbackend.serving.adapter, specbackend.serving.preprocessor"
    code = f"import sys, {modules}; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
