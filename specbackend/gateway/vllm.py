"""vLLM's routes beside OpenAI's: text to tokens and back, as the model reads it."""

from specbackend.gateway.errors import refused
from specbackend.gateway.inputs import chat_text
from specbackend.gateway.protocol import ChatPrompt, DetokenizeRequest, TokenizeRequest
from specbackend.tokenizer import Tokenizer


def tokenize(tokenizer: Tokenizer, request: TokenizeRequest) -> list[int]:
    """Raises ApiError and InvalidRequest."""
    is_text = request.prompt is not None
    if not is_text and request.messages is None:
        raise refused("prompt", "send it or messages")
    if is_text and (useless := [name for name in ChatPrompt.model_fields if getattr(request, name) is not None]):
        raise refused(useless[0], "says nothing beside prompt")
    text = request.prompt if is_text else chat_text(tokenizer, request)
    with_special_tokens = is_text if request.add_special_tokens is None else request.add_special_tokens
    return tokenizer.encode(text, add_special_tokens=with_special_tokens)


def detokenize(tokenizer: Tokenizer, request: DetokenizeRequest) -> str:
    """Raises ApiError for a token that there is not."""
    if max(request.tokens, default=0) >= tokenizer.vocab_size:
        raise refused("tokens", f"must lie below {tokenizer.vocab_size}, the tokenizer's vocabulary")
    return tokenizer.decode(request.tokens, skip_special_tokens=False)
