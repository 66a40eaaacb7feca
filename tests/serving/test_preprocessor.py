"""Text to ids, with the chat template unless the request or the server says otherwise."""

import pytest

from specbackend.errors import ConfigError
from specbackend.serving.preprocessor import Preprocessor
from specbackend.tokenizer import Tokenizer
from tests.fakes import FakeError, FakePbUtils, FakeRequest

CHAT = "<|user|>hi<|assistant|>"


@pytest.mark.parametrize(
    ("default", "inputs", "text"),
    [
        ("true", {}, CHAT),
        ("false", {}, "hi"),
        ("true", {"apply_chat_template": False}, "hi"),
        ("false", {"apply_chat_template": True}, CHAT),
    ],
)
def test_chat_template(triton_args, checkpoint, default, inputs, text):
    preprocessor = Preprocessor(FakePbUtils, triton_args(apply_chat_template=default))
    [response] = preprocessor.execute([FakeRequest(text_input="hi", **inputs)])
    expected = Tokenizer(checkpoint).encode(text)
    assert response.outputs["input_ids"].tolist() == [expected]
    assert response.outputs["input_ids"].dtype.name == "int32"


@pytest.mark.parametrize("text", ["", "x" * 10_000_000, "x" * 600])
def test_bad_prompts_fail_alone(triton_args, text):
    preprocessor = Preprocessor(FakePbUtils, triton_args())
    bad, good = preprocessor.execute([FakeRequest(text_input=text), FakeRequest(text_input="hi")])
    assert bad.error.code == FakeError.INVALID_ARG and str(bad.error).startswith("text_input: ")
    assert good.error is None


def test_unknown_parameters_are_refused(triton_args):
    with pytest.raises(ConfigError, match="unknown parameter chat; known: model_path, "):
        Preprocessor(FakePbUtils, triton_args(chat="true"))


def test_without_a_template_text_is_taken_as_it_is(triton_args, tmp_path, checkpoint):
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    with pytest.raises(ConfigError, match=r"apply_chat_template: .* set it to false"):
        Preprocessor(FakePbUtils, triton_args(model_path=tmp_path, apply_chat_template="true"))
    preprocessor = Preprocessor(FakePbUtils, triton_args(model_path=tmp_path))
    [plain] = preprocessor.execute([FakeRequest(text_input="hi")])
    assert plain.outputs["input_ids"].tolist() == [Tokenizer(tmp_path).encode("hi")]
    [response] = preprocessor.execute([FakeRequest(text_input="hi", apply_chat_template=True)])
    assert str(response.error).startswith("apply_chat_template: ")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no such role') }}", "text_input: chat template: no such role"),
        ("{{ 1 + messages }}", "TypeError"),
    ],
)
def test_a_template_that_fails_fails_its_request_alone(triton_args, tmp_path, checkpoint, template, message):
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(template)
    preprocessor = Preprocessor(FakePbUtils, triton_args(model_path=tmp_path))
    bad, good = preprocessor.execute(
        [FakeRequest(text_input="hi"), FakeRequest(text_input="hi", apply_chat_template=False)]
    )
    assert message in str(bad.error) and good.error is None


def test_context_length_that_is_no_number_is_refused(triton_args):
    with pytest.raises(ConfigError, match="context_length: 'long' is not a number"):
        Preprocessor(FakePbUtils, triton_args(context_length="long"))
