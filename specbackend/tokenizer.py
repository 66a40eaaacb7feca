"""A checkpoint's tokenizer and chat template.

Without transformers, which would bring torch, 4 s and 260 MB, into Triton's process.
"""

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from specbackend.errors import ConfigError


class ChatTemplateError(ValueError):
    """What the chat template has against a conversation, in its own words."""


class Tokenizer:
    """Text to ids and back. Raises ConfigError if the folder has no tokenizer, or one that cannot be read."""

    def __init__(self, path: str | Path):
        self._path = Path(path)
        self._fast = _load(self._path)
        self._fast.no_truncation()  # tokenizer.json may carry the settings of somebody's training run
        self._fast.no_padding()
        self._config = _read_json(self._path / "tokenizer_config.json")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._fast.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._fast.decode(token_ids, skip_special_tokens=skip_special_tokens)

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
        return self._template_source is not None

    def check_chat_template(self) -> None:
        """Raises ConfigError if there is no template, or its syntax is broken."""
        _ = self._template

    def apply_chat_template(
        self,
        messages: list[dict],
        tools: list[dict] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: object,
    ) -> str:
        """Render the conversation up to where the assistant speaks; the text already holds its special tokens.

        With `continue_final_message` it ends where the last message's content does. Raises ConfigError like
        `check_chat_template`, and ChatTemplateError.
        """
        template = self._template
        variables = {**self._special_tokens, **template_kwargs, "messages": messages, "tools": tools}
        try:
            text = template.render(**variables, add_generation_prompt=add_generation_prompt)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"chat template: {error}") from error
        return _up_to_the_end_of(messages[-1]["content"].strip(), text) if continue_final_message else text

    @cached_property
    def _template(self) -> jinja2.Template:
        if self._template_source is None:
            raise ConfigError("the tokenizer has no chat template")
        try:
            return _template_environment().from_string(self._template_source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"chat template: {error}") from error

    @cached_property
    def _template_source(self) -> str | None:
        own_file = self._path / "chat_template.jinja"
        if own_file.exists():
            return own_file.read_text(encoding="utf-8")
        source = self._config.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        return source

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        """bos_token and the like, which templates refer to; a token is a string or {"content": string}."""
        entries = {name: value for name, value in self._config.items() if name.endswith("_token")}
        texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in entries.items()}
        return {name: text for name, text in texts.items() if isinstance(text, str)}


def _up_to_the_end_of(content: str, text: str) -> str:
    start = text.rfind(content)
    if start < 0:
        raise ChatTemplateError("chat template: the last message cannot be continued, its content is not in the text")
    return text[: start + len(content)]


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
