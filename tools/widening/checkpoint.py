"""Whole checkpoints: a target, and the heads that read its streams."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from specbackend.models.model_config import ModelConfig
from widening import WideningError
from widening.axes import Layout, make_identity_
from widening.shape import Shape, check, layer_places
from widening.shards import ShardWriter, readers

LAYER = re.compile(r"model\.layers\.(\d+)\.")
FIRST_LAYER, EMBEDDING = "model.layers.0.", "model.embed_tokens.weight"
AUX_LAYERS = "eagle_aux_hidden_state_layer_ids"
NOT_COPIED = (".safetensors", ".bin", ".index.json", ".png", ".md")  # weights, and cards that tell of the original
CARD = """# {name}, widened

`{name}` widened by `tools/widen_checkpoint` to {parameters:,} parameters. It computes what the original does at the
cost of its new shape: a subject for benchmarks, no better a model. Of its {new:,} tokens the first {old:,} are real.
Greedy text never has another; sampled text may, unless top_k or top_p leaves them out.
"""

Named = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class Original:
    """A checkpoint as it is."""

    folder: Path
    config: ModelConfig
    shape: Shape

    @classmethod
    def read(cls, folder: Path) -> "Original":
        config = ModelConfig.read(folder)
        if config.qk_norm:
            raise WideningError(f"{folder}: has query and key norms, which longer heads would change")
        if "transformer_layer_config" in config.raw:
            raise WideningError(f"{folder}: is in the speculators format, which is not written here")
        return cls(folder, config, Shape.of(config))


@dataclass(frozen=True)
class Job:
    """One checkpoint to write: what it is made from, the shape it gets, and what its config says beside it."""

    original: Original
    shape: Shape
    changes: dict

    def __post_init__(self):
        try:
            check(self.original.shape, self.shape)
        except WideningError as error:
            raise WideningError(f"{self.original.folder}: {error}") from error


def widen_checkpoints(
    target: Path, heads: list[Path], out: Path, shape: Shape, dtype: str | None, device: str = "cpu"
) -> dict[str, int]:
    """Write out/<name> for the target and every head. Returns their numbers of parameters.

    Everything is checked before anything is written. Tensors are made on `device`, where there must be room for about
    three times the largest in float32 and for three shards; the noise in them depends on its kind.
    """
    original = Original.read(target)
    jobs = [target_job(original, shape)] + [head_job(Original.read(head), original, shape) for head in heads]
    folders = [out / job.original.folder.resolve().name for job in jobs]
    if len(set(folders)) < len(folders):
        raise WideningError(f"{', '.join(map(str, folders))}: two checkpoints of one name")
    if there := [str(folder) for folder in folders if folder.exists()]:
        raise WideningError(f"{', '.join(there)}: exists already")
    return {str(folder): write(job, folder, dtype, device) for job, folder in zip(jobs, folders, strict=True)}


def target_job(original: Original, shape: Shape) -> Job:
    raw = original.config.raw
    changes = {"tie_word_embeddings": False}  # embedding and LM head grow differently
    if "layer_types" in raw:
        changes["layer_types"] = raw["layer_types"][:1] * shape.num_hidden_layers
    return Job(original, replace(shape, draft_vocab_size=None), changes)


def head_job(head: Original, target: Original, shape: Shape) -> Job:
    """A head gets the target's new shape, one layer of it."""
    for name in ("hidden_size", "vocab_size"):
        mine, theirs = getattr(head.shape, name), getattr(target.shape, name)
        if mine != theirs:
            raise WideningError(f"{head.folder}: {name} is {mine}, the target's is {theirs}")
    places, raw = layer_places(target.shape.num_hidden_layers, shape.num_hidden_layers), head.config.raw
    changes = {"target_hidden_size": shape.hidden_size}
    if raw.get(AUX_LAYERS):
        changes[AUX_LAYERS] = [places[layer] for layer in raw[AUX_LAYERS]]
    nested = raw.get("eagle_config") or {}
    if nested.get(AUX_LAYERS):  # here a layer is named by its output
        changes["eagle_config"] = nested | {AUX_LAYERS: [places[layer + 1] - 1 for layer in nested[AUX_LAYERS]]}
    W = head.shape.draft_vocab_size
    drafted = None if W is None else shape.draft_vocab_size or W
    return Job(head, replace(shape, num_hidden_layers=1, draft_vocab_size=drafted), changes)


def write(job: Job, folder: Path, dtype: str | None, device: str) -> int:
    """Write config, weights, card and the files that stay as they are. Returns the number of parameters."""
    original = job.original
    folder.mkdir(parents=True)
    dtype = dtype or original.config.torch_dtype
    raw = {name: value for name, value in original.config.raw.items() if name != "torch_dtype"}
    shape = {name: value for name, value in asdict(job.shape).items() if value is not None}
    config = raw | shape | job.changes | {"dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for path in original.folder.iterdir():
        if path.is_file() and not path.name.endswith(NOT_COPIED) and path.name != "config.json":
            shutil.copy(path, folder)
    writer = ShardWriter(folder)
    for name, tensor in widened(job, device):
        writer.add(name, tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor)
    writer.finish()
    facts = {"parameters": writer.num_parameters, "old": original.shape.vocab_size, "new": job.shape.vocab_size}
    (folder / "README.md").write_text(CARD.format(name=original.folder.resolve().name, **facts))
    return writer.num_parameters


def widened(job: Job, device: str) -> Named:
    """All tensors of the new checkpoint, made one at a time."""
    old, new, read = job.original.shape, job.shape, readers(job.original.folder)
    layout, generator = Layout(old, new), torch.Generator(device).manual_seed(0)
    places = layer_places(old.num_hidden_layers, new.num_hidden_layers)
    if job.original.config.tie_word_embeddings and EMBEDDING in read:
        read["lm_head.weight"] = read[EMBEDDING]
    if old.draft_vocab_size:  # a head over the whole vocabulary may do without
        read.setdefault("d2t", lambda: torch.zeros(old.draft_vocab_size, dtype=torch.int64))
    for name, take in read.items():
        if name in DRAFT_TOKENS:
            yield name, DRAFT_TOKENS[name](take(), old, new)
        else:
            placed = LAYER.sub(lambda match: f"model.layers.{places[int(match[1])]}.", name)
            yield placed, layout.widen(name, take().to(device), generator)
    for index in sorted(set(range(new.num_hidden_layers)) - set(places)):
        for name in (name for name in read if name.startswith(FIRST_LAYER)):
            tensor = make_identity_(name, layout.widen(name, read[name]().to(device), generator), generator)
            yield name.replace(FIRST_LAYER, f"model.layers.{index}."), tensor


def _widen_d2t(offset_W: Tensor, old: Shape, new: Shape) -> Tensor:
    """Target id = draft id + offset. The new draft tokens are the first new tokens of the target."""
    W = len(offset_W)
    return torch.cat([offset_W, offset_W.new_full((new.num_drafted - W,), old.vocab_size - W)])


def _widen_t2d(drafted_V: Tensor, old: Shape, new: Shape) -> Tensor:
    more = new.num_drafted - old.num_drafted
    return torch.cat([drafted_V, torch.arange(new.vocab_size - old.vocab_size) < more])


DRAFT_TOKENS = {"d2t": _widen_d2t, "t2d": _widen_t2d}
