"""The tokenizer without transformers says what transformers says."""

import json
import subprocess
import sys

import pytest

from specbackend.errors import ConfigError
from specbackend.tokenizer import Tokenizer
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


def with_template(folder, template: str) -> Tokenizer:
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
    ],
)
def test_template_features_equal_transformers(tmp_path, theirs, template):
    expected = theirs.apply_chat_template(CHAT, chat_template=template, tokenize=False)
    assert with_template(tmp_path, template).apply_chat_template(CHAT) == expected


def test_the_stub_side_does_not_import_torch():
    """Torch in Triton's process would cost 4 s and 260 MB, and fight the engine for the cores."""
    modules = "specbackend.serving.adapter, specbackend.serving.preprocessor"
    code = f"import sys, {modules}; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
