"""Which draft network a checkpoint holds, and whether the configured algorithm fits it."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

from specbackend.config import EngineConfig
from specbackend.errors import ConfigError
from specbackend.models.causal_draft import CausalDraftModel
from specbackend.models.draft import DraftModel, DraftVocabulary, read_token_map
from specbackend.models.eagle import EagleModel
from specbackend.models.eagle3 import Eagle3Model, canonical_name
from specbackend.models.llama import MTP_PREFIX, LlamaModel
from specbackend.models.loader import tensor_names
from specbackend.models.mtp import MtpModel

KINDS = {
    "EAGLE": "an EAGLE-1/2 head",
    "EAGLE3": "an EAGLE-3 head",
    "NEXTN": "a checkpoint with MTP layers of its own",
    "STANDALONE": "a language model",
}


def load_draft(config: EngineConfig, target: LlamaModel, dtype, device, num_positions: int) -> DraftModel | None:
    """The draft network of config.speculative_algorithm, None for an algorithm without one. Raises ConfigError."""
    algorithm = config.speculative_algorithm
    if algorithm in (None, "NGRAM"):
        return None
    folder = Path(config.speculative_draft_model_path or config.model_path)
    check_kind(algorithm, folder)
    check_tokenizers(Path(config.model_path), folder)
    if algorithm == "EAGLE3":
        return Eagle3Model(folder, target, dtype, device, num_positions)
    if algorithm == "STANDALONE":
        return CausalDraftModel(folder, target, dtype, device, num_positions)
    token_map = config.speculative_token_map
    token_ids = read_token_map(Path(token_map), target.config.vocab_size) if token_map else None
    vocabulary = DraftVocabulary.of_target(target, token_ids)
    if algorithm == "NEXTN":
        return MtpModel(folder, target, vocabulary, dtype, device)
    return EagleModel(folder, target, vocabulary, dtype, device, num_positions)


def check_kind(algorithm: str, folder: Path) -> None:
    """Refuse a checkpoint of another kind. An EAGLE-3 head would load as EAGLE well enough to accept nothing."""
    found = kind_of(tensor_names(folder))
    if found is None:
        raise ConfigError(f"{folder}: {algorithm} needs {KINDS[algorithm]}, and this is no kind of draft known here")
    fits = {found, "STANDALONE"} if found == "NEXTN" else {found}
    if algorithm not in fits:
        raise ConfigError(
            f"{folder}: {algorithm} needs {KINDS[algorithm]}, this is {KINDS[found]} (speculative_algorithm {found})"
        )


def kind_of(names: Iterable[str]) -> str | None:
    """The algorithm that these tensors are for."""
    names = set(names)
    if any(name.startswith(MTP_PREFIX) for name in names):
        return "NEXTN"
    names = {canonical_name(name) for name in names}
    if "midlayer.hidden_norm.weight" in names:
        return "EAGLE3"
    if "fc.weight" in names and "hidden_norm.weight" not in names:  # DFlash has both
        return "EAGLE"
    if "embed_tokens.weight" in names and "midlayer.input_layernorm.weight" in names:
        return "STANDALONE"
    return None


def check_tokenizers(target: Path, draft: Path) -> None:
    """Refuse a draft whose tokenizer, if it brings one, gives the target's ids another meaning."""
    files = [folder / "tokenizer.json" for folder in (target, draft)]
    if target == draft or not all(file.is_file() for file in files):
        return
    mine, theirs = (_vocabulary(file) for file in files)
    for token, token_id in mine.items():
        if theirs.get(token, token_id) != token_id:
            raise ConfigError(f"{draft}: its tokenizer gives {token!r} the id {theirs[token]}, the target's {token_id}")


def _vocabulary(file: Path) -> dict[str, int]:
    try:
        return Tokenizer.from_file(str(file)).get_vocab()
    except Exception as error:  # it has no class of its own
        raise ConfigError(f"{file}: {error}") from error
