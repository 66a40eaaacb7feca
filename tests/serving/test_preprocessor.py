"""Text to ids, with the chat template unless the request or the server says otherwise."""

from pathlib import Path

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


def test_the_code_is_told_to_whoever_asks(triton_args):
    asks = {"parameters": {"return_error_code": True}}
    [response] = Preprocessor(FakePbUtils, triton_args()).execute([FakeRequest(text_input="", **asks)])
    assert str(response.error).startswith("INVALID_ARGUMENT: text_input: ")


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


def test_internal_errors_are_logged_without_what_they_say(triton_args, monkeypatch, caplog):
    preprocessor = Preprocessor(FakePbUtils, triton_args())
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text, **_: int(text))
    bad = [FakeRequest(text_input="my secret"), FakeRequest(text_input="")]
    internal, invalid = (response.error for response in preprocessor.execute(bad))
    assert internal.code == FakeError.INTERNAL and "my secret" in str(internal)
    assert invalid.code == FakeError.INVALID_ARG
    assert caplog.text.count("ValueError") == 1 and "preprocessor.py" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("broken", ["{{ }", "{% for %}", "{% nonsense %}"])
def test_broken_template_is_a_fault_only_where_it_is_used(triton_args, tmp_path, checkpoint, broken):
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(broken)
    for params in ({}, {"apply_chat_template": "true"}):
        with pytest.raises(ConfigError, match=r"apply_chat_template: .*chat template: .*set it to false"):
            Preprocessor(FakePbUtils, triton_args(model_path=tmp_path, **params))
    preprocessor = Preprocessor(FakePbUtils, triton_args(model_path=tmp_path, apply_chat_template="false"))
    requests = [FakeRequest(text_input="hi"), FakeRequest(text_input="hi", apply_chat_template=True)]
    plain, chat = preprocessor.execute(requests)
    assert plain.outputs["input_ids"].tolist() == [Tokenizer(tmp_path).encode("hi")]
    assert chat.error.code == FakeError.INVALID_ARG
    assert str(chat.error).startswith("apply_chat_template: chat template: ")
    assert str(tmp_path) not in str(chat.error)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"context_length": "long"}, "context_length: must be a positive integer, got 'long'"),
        ({"context_length": "0"}, "context_length: must be a positive integer, got '0'"),
        ({"context_length": "-7"}, "context_length: must be a positive integer, got '-7'"),
        ({"context_length": "1e3"}, "context_length: must be a positive integer, got '1e3'"),
        ({"apply_chat_template": "maybe"}, "apply_chat_template: must be true or false, got 'maybe'"),
        ({"model_path": ""}, "model_path: is required"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(triton_args, params, message):
    with pytest.raises(ConfigError) as error:
        Preprocessor(FakePbUtils, triton_args(**params))
    assert str(error.value) == message


def test_zero_in_model_json_is_no_default(triton_args):
    args = triton_args()
    folder = Path(args["model_repository"]) / "1"
    folder.mkdir(parents=True)
    (folder / "model.json").write_text('{"context_length": 0}')
    with pytest.raises(ConfigError, match="context_length: must be a positive integer, got 0"):
        Preprocessor(FakePbUtils, args)


@pytest.mark.parametrize("unset", ["", "none"])
def test_empty_parameters_mean_what_the_checkpoint_says(triton_args, checkpoint, unset):
    preprocessor = Preprocessor(FakePbUtils, triton_args(context_length=unset, apply_chat_template=unset))
    long, chat = preprocessor.execute([FakeRequest(text_input="x" * 600), FakeRequest(text_input="hi")])
    assert "context_length 512" in str(long.error)
    assert chat.outputs["input_ids"].tolist() == [Tokenizer(checkpoint).encode(CHAT)]
