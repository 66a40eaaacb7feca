"""A checkpoint's tokenizer and chat template.

Without transformers, which would bring torch, 4 s and 260 MB, into Triton's process.
"""

import json
import os
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from specbackend.errors import ConfigError

DEFAULT, TOOL_USE = "default", "tool_use"  # names of templates; the second is for conversations with tools
DEVELOPER = "developer"  # a role
END_MARK = "END_OF_THE_FINAL_MESSAGE"  # its place in the rendered text is where the model goes on


class ChatTemplateError(ValueError):
    """What the chat template has against a conversation, in its own words."""


class Tokenizer:
    """Text to ids and back. Raises ConfigError if the folder has no tokenizer, or one that cannot be read.

    chat_template: the path of a Jinja file, or a template, which takes the place of the checkpoint's own.
    """

    def __init__(self, path: str | Path, chat_template: str | Path | None = None):
        self._path = Path(path)
        self._fast = _load(self._path)
        self._fast.no_truncation()  # tokenizer.json may carry the settings of somebody's training run
        self._fast.no_padding()
        self._config = _read_json(self._path / "tokenizer_config.json")
        self._given_template = None if chat_template is None else _given_template(str(chat_template))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        # As a batch, for which the lock of Python's is given back: other threads go on, however long the text.
        [encoding] = self._fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._fast.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def names(self, token_ids: Sequence[int]) -> list[str]:
        """As the vocabulary writes them, which is not always what they decode to."""
        return [self._fast.id_to_token(token) for token in token_ids]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self._fast.get_vocab().values())

    def to_json(self) -> str:
        """What tokenizer.json holds, whatever file it was read from."""
        return self._fast.to_str()

    @cached_property
    def max_token_bytes(self) -> int:
        """No token stands for more bytes of text, so a text of n bytes has at least n / max_token_bytes tokens."""
        return max(len(token.encode()) for token in self._fast.get_vocab())

    @property
    def has_chat_template(self) -> bool:
        """Whether there is one; `check_chat_template` says whether it is any good."""
        return DEFAULT in self._template_sources

    def check_chat_template(self) -> None:
        """Raises ConfigError if there is no template, or its syntax is broken."""
        _ = self._templates

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> str:
        """Render the conversation, as transformers does; the text already holds its special tokens.

        messages: JSON objects, OpenAI's; what is null in them is as good as absent. A template that does not know the
            role developer gets it as system, which it is in OpenAI's older words.
        tools: JSON objects {"type": "function", "function": {"name", "description", "parameters"}}.
        add_generation_prompt: up to where the assistant speaks.
        continue_final_message: up to the end of what the last message says, for the model to go on.
        template_kwargs: more variables of the template, as `enable_thinking` or `date_string`.

        Raises ConfigError like `check_chat_template`, and ChatTemplateError.
        """
        if not messages:
            raise ChatTemplateError("chat template: there are no messages")
        if continue_final_message and add_generation_prompt:
            raise ChatTemplateError(
                "chat template: continue_final_message and add_generation_prompt exclude each other"
            )
        variables = {
            **self._special_tokens,
            "documents": None,
            **template_kwargs,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        name = TOOL_USE if tools is not None and TOOL_USE in self._templates else DEFAULT
        template = self._templates[name]
        messages = [{key: value for key, value in each.items() if value is not None} for each in messages]
        if DEVELOPER not in self._template_sources[name]:
            messages = [{**each, "role": "system"} if each.get("role") == DEVELOPER else each for each in messages]
        render = partial(_render, template, variables)
        return _up_to_final_message(render, messages) if continue_final_message else render(messages)

    @cached_property
    def _templates(self) -> dict[str, jinja2.Template]:
        if not self.has_chat_template:
            raise ConfigError("the tokenizer has no chat template")
        environment, sources = _template_environment(), self._template_sources
        try:
            return {name: environment.from_string(sources[name]) for name in (DEFAULT, TOOL_USE) if name in sources}
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"chat template: {error}") from error

    @cached_property
    def _template_sources(self) -> dict[str, str]:
        """By name. A checkpoint that has files of them has none in its configuration."""
        if self._given_template is not None:
            return {DEFAULT: self._given_template}
        files = {path.stem: path for path in (self._path / "additional_chat_templates").glob("*.jinja")}
        if (self._path / "chat_template.jinja").exists():
            files[DEFAULT] = self._path / "chat_template.jinja"
        if files:
            return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
        source = self._config.get("chat_template") or {}
        if isinstance(source, list):  # several, by name
            return {entry["name"]: entry["template"] for entry in source}
        return {DEFAULT: source} if source else {}

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        """bos_token and the like, which templates refer to; a token is a string or {"content": string}."""
        entries = {name: value for name, value in self._config.items() if name.endswith("_token")}
        texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in entries.items()}
        return {name: text for name, text in texts.items() if isinstance(text, str)}


def _load(path: Path) -> FastTokenizer:
    if (path / "tokenizer.json").exists():
        try:
            return FastTokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # it has no class of its own
            raise ConfigError(f"{path / 'tokenizer.json'}: {error}") from error
    if not (path / "tokenizer_config.json").exists():
        raise ConfigError(f"model_path: {path} has neither tokenizer.json nor tokenizer_config.json")
    from transformers import AutoTokenizer  # converts older formats; slow, so only where it must be

    return AutoTokenizer.from_pretrained(str(path)).backend_tokenizer


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from error


def _given_template(text: str) -> str:
    if os.path.isfile(text):
        return Path(text).read_text(encoding="utf-8")
    if "{" not in text:
        raise ConfigError(f"chat_template: {text!r} is neither a file nor a template")
    return text


def _render(template: jinja2.Template, variables: dict[str, Any], messages: list[dict[str, Any]]) -> str:
    try:
        return template.render({**variables, "messages": messages})
    except jinja2.TemplateError as error:
        raise ChatTemplateError(f"chat template: {error}") from error
    except Exception as error:  # what the template's expressions raise
        raise ChatTemplateError(f"chat template: {type(error).__name__}: {error}") from error


def _up_to_final_message(render: Callable[[list[dict[str, Any]]], str], messages: list[dict[str, Any]]) -> str:
    """Render a conversation and cut it off where its last message ends.

    Some templates strip what is said, and with it the space behind the mark; they mean it for the message, too.
    """
    text = render([*messages[:-1], _with_end_mark(messages[-1])])
    said, mark, rest = text.rpartition(END_MARK)
    if not mark:
        raise ChatTemplateError("chat template: does not show the final message, so it cannot be continued")
    return said if rest.startswith(" ") else said.rstrip()


def _with_end_mark(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": f"{content}{END_MARK} "}
    parts = content if isinstance(content, list) else []
    last = max((index for index, part in enumerate(parts) if "text" in part), default=None)
    if last is None:
        raise ChatTemplateError("chat template: the final message has no text to continue")
    marked = {**parts[last], "text": f"{parts[last]['text']}{END_MARK} "}
    return {**message, "content": [*parts[:last], marked, *parts[last + 1 :]]}


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks what the assistant says, for training; here it is only a block."""

    tags = frozenset(("generation",))

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


def _template_environment() -> ImmutableSandboxedEnvironment:
    """What transformers offers to chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
