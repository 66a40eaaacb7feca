"""The drafted trees are those of the official algorithm, for every kind of head: same tokens, same parents.

Greedy requests get exactly the official trees if forecasts are made at temperature 1.
"""

import pytest
import torch

from specbackend import Engine
from specbackend.request import Request
from specbackend.sampling import pick
from specbackend.sampling.pick import gumbel_noise
from specbackend.sampling_params import SamplingParams
from specbackend.speculative import head_drafter
from specbackend.speculative.native_step import NativeTreeDecoder
from specbackend.speculative.tree_decoder import TreeDecoder
from tests.checkpoints import write_head, write_target
from tests.conftest import DEMO_EAGLE3
from tests.speculative.reference_heads import ReferenceEagle, ReferenceEagle3, ReferenceMtp, grow_tree
from tests.test_equivalence import make_engine

SEED = 5
TREE_NAMES = ("speculative_num_steps", "speculative_eagle_topk", "speculative_num_draft_tokens")


def drafted_trees(
    engine, prompt: list[int], steps: int, monkeypatch, **params
) -> list[tuple[list[int], list[int], list[int]]]:
    """Run a few decode steps; return (all tokens before the step, tree tokens, tree parents) of each.

    Of steps that are not one call, in which a tree is seen by nobody.
    """
    trees, build_tree = [], head_drafter.build_tree

    def recording_build_tree(*args):
        trees.append(build_tree(*args))
        return trees[-1]

    monkeypatch.setattr(head_drafter, "build_tree", recording_build_tree)
    monkeypatch.setattr(NativeTreeDecoder, "decode", TreeDecoder.decode)
    params = {"max_new_tokens": 200, "temperature": 0.0, "ignore_eos": True, "seed": SEED, **params}
    request = Request("probe", prompt, SamplingParams.from_dict(params))
    engine.submit(request)
    contexts = []
    while len(trees) < steps and engine.has_work:
        known, before = len(trees), request.all_ids
        engine.step()
        contexts += [before] * (len(trees) - known)
    engine.cancel("probe")
    return [
        (context, tree.token_BN[0].tolist(), tree.parent_BN[0].tolist())
        for context, tree in zip(contexts, trees, strict=True)
    ]


@pytest.fixture
def official_scale(monkeypatch):
    monkeypatch.setattr(pick, "LOWEST_FORECAST_TEMPERATURE", 1.0)


@pytest.mark.usefixtures("official_scale")
@pytest.mark.parametrize("tree", [(5, 4, 8), (5, 1, 6), (3, 8, 32), (1, 3, 4)], ids=str)
def test_tree_equals_official_growth(tree, hf_target, demo_prompts, monkeypatch):
    engine, reference = make_engine(tree), ReferenceEagle3(DEMO_EAGLE3, hf_target)
    for prompt in demo_prompts[:25]:
        for context, tokens, parents in drafted_trees(engine, prompt, 3, monkeypatch):
            assert (tokens, parents) == grow_tree(reference, context, *tree)


def forecast_of(context: list[int], num_prompt: int, draft: ReferenceEagle3, params: dict):
    """What the target would pick if the draft's logits were its own, on one text: see `sampling.forecast`."""
    temperature = params["temperature"]
    token_W = torch.tensor([draft.target_id(draft_id) for draft_id in range(len(draft.weights["d2t"]))])

    def adjust(logits_W, path):
        if penalty := params.get("frequency_penalty"):
            said = torch.tensor(context[num_prompt:] + path)
            logits_W = logits_W - penalty * said.bincount(minlength=int(token_W.max()) + 1)[token_W]
        for *before, last in params.get("bad_words_ids", []):
            if (context + path)[-len(before) :] == before:
                logits_W = logits_W.masked_fill(token_W == last, -torch.inf)
        if temperature:
            if top_k := params.get("top_k"):
                logits_W = logits_W.where(logits_W >= logits_W.topk(top_k).values[-1], -torch.inf)
            position = torch.tensor([[len(context) + len(path)]])
            logits_W = logits_W + temperature * gumbel_noise(torch.tensor([SEED]), position, token_W)[0, 0]
        return logits_W / max(temperature, 0.5)

    return adjust


FORECASTS = [
    {"temperature": 0.0},
    {"temperature": 0.5},
    {"temperature": 0.7, "top_k": 6},
    {"temperature": 1.5},
    {"temperature": 0.0, "frequency_penalty": 2.0},
]


@pytest.mark.parametrize("params", FORECASTS, ids=str)
def test_candidates_are_what_the_target_would_pick_by_the_drafts_logits(params, hf_target, demo_prompts, monkeypatch):
    tree = (5, 4, 8)
    engine, reference = make_engine(tree), ReferenceEagle3(DEMO_EAGLE3, hf_target)
    for prompt in demo_prompts[:4]:
        for context, tokens, parents in drafted_trees(engine, prompt, 3, monkeypatch, **params):
            adjust = forecast_of(context, len(prompt), reference, params)
            assert (tokens, parents) == grow_tree(reference, context, *tree, adjust=adjust)


def test_candidates_know_bad_words_that_begin_at_the_root(hf_target, demo_prompts, monkeypatch):
    """The root, a child and a grandchild, of all that would be drafted otherwise."""
    tree = (5, 4, 8)
    engine, reference = make_engine(tree), ReferenceEagle3(DEMO_EAGLE3, hf_target)
    for prompt in demo_prompts[:6]:
        [(_, tokens, parents)] = drafted_trees(engine, prompt, 1, monkeypatch)
        deep = [node for node, above in enumerate(parents) if above > 0 and parents[above] == 0]
        words = [[tokens[0], tokens[parents[node]], tokens[node]] for node in deep]
        params = {"temperature": 0.0, "bad_words_ids": words}
        [(context, tokens, parents)] = drafted_trees(engine, prompt, 1, monkeypatch, **params)
        adjust = forecast_of(context, len(prompt), reference, params)
        assert (tokens, parents) == grow_tree(reference, context, *tree, adjust=adjust)


def test_a_batch_of_several_temperatures_drafts_as_each_alone(demo_prompts):
    engine = make_engine((5, 4, 8))
    params = [{"temperature": 0.4 * i, "max_new_tokens": 24, "seed": i} for i in range(6)]
    together = engine.generate(input_ids=demo_prompts[:6], sampling_params=params)
    alone = [engine.generate(input_ids=p, sampling_params=s) for p, s in zip(demo_prompts, params, strict=False)]
    assert [a["meta_info"]["spec_verify_ct"] for a in together] == [a["meta_info"]["spec_verify_ct"] for a in alone]


AUX = "eagle_aux_hidden_state_layer_ids"
BIASES = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}
HEADS = {  # kind, what the file has (see tests/checkpoints.py), what the config says
    "eagle": ("EAGLE", {}, {}),
    "eagle-without-fc-bias": ("EAGLE", {"fc_bias": False}, {}),
    "eagle-qkv-bias": ("EAGLE", {"qkv_bias": True}, {"rope_theta": 500.0}),
    "eagle3": ("EAGLE3", {}, {}),
    "eagle3-d2t": ("EAGLE3", {}, {"draft_vocab_size": 40}),
    "eagle3-rope": ("EAGLE3", {}, {"rope_theta": 500.0}),
    "eagle3-other-heads": ("EAGLE3", {}, {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12}),
    "eagle3-biases": ("EAGLE3", BIASES, {}),
    "eagle3-narrow": ("EAGLE3", {"own_embedding": True}, {"hidden_size": 24, "target_hidden_size": 32}),
    "eagle3-norm-before-residual": ("EAGLE3", {}, {"norm_before_residual": True}),
    "eagle3-norm-before-fc": ("EAGLE3", {"norm_before_fc": True}, {}),
    "eagle3.1": ("EAGLE3", {"fc_norm": True}, {"norm_output": True, "fc_norm": True}),
    "eagle3-aux-layers": ("EAGLE3", {"num_features": 2}, {AUX: [1, 6]}),
    "eagle3-aux-layers-nested": ("EAGLE3", {}, {"eagle_config": {AUX: [0, 3, 5]}}),
    "eagle3-final-hidden": ("EAGLE3", {"num_features": 0}, {"eagle_config": {"use_aux_hidden_state": False}}),
}
PROMPTS = [torch.randint(64, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (1, 30)]


def assert_official_growth(engine, reference, tree, monkeypatch) -> None:
    for prompt in PROMPTS:
        for context, tokens, parents in drafted_trees(engine, prompt, 3, monkeypatch):
            assert (tokens, parents) == grow_tree(reference, context, *tree)


def random_engine(folder, tree, **params) -> Engine:
    tree = dict(zip(TREE_NAMES, tree, strict=True)) | {"speculative_adaptive": False}
    return Engine(model_path=str(folder), max_running_requests=1, chunked_prefill_size=7, **tree, **params)


@pytest.mark.usefixtures("official_scale")
@pytest.mark.parametrize("tree", [(4, 3, 10), (3, 1, 4)], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_random_heads(head, tree, tmp_path, monkeypatch):
    kind, options, config = HEADS[head]
    target = write_target(tmp_path / "target", num_hidden_layers=7)
    write_head(tmp_path / "head", kind, target.config, options=options, **config)
    reference = {"EAGLE": ReferenceEagle, "EAGLE3": ReferenceEagle3}[kind](tmp_path / "head", target)
    draft = {"speculative_algorithm": kind, "speculative_draft_model_path": str(tmp_path / "head")}
    assert_official_growth(random_engine(tmp_path / "target", tree, **draft), reference, tree, monkeypatch)


@pytest.mark.usefixtures("official_scale")
@pytest.mark.parametrize("tree", [(4, 3, 10), (1, 1, 2)], ids=str)
def test_random_mtp_layer(tree, tmp_path, monkeypatch):
    target = write_target(tmp_path, "mimo")
    engine = random_engine(tmp_path, tree, speculative_algorithm="NEXTN")
    assert_official_growth(engine, ReferenceMtp(tmp_path, target), tree, monkeypatch)


@pytest.mark.usefixtures("official_scale")
def test_token_map(tmp_path, monkeypatch):
    tree, token_map = (4, 3, 10), [9, 3, 60, 17, 2, 33, 41, 5]
    target = write_target(tmp_path / "target")
    write_head(tmp_path / "head", "EAGLE", target.config)
    torch.save(token_map, tmp_path / "freq_8.pt")
    engine = random_engine(
        tmp_path / "target",
        tree,
        speculative_algorithm="EAGLE",
        speculative_draft_model_path=str(tmp_path / "head"),
        speculative_token_map=str(tmp_path / "freq_8.pt"),
    )
    assert_official_growth(engine, ReferenceEagle(tmp_path / "head", target, token_map), tree, monkeypatch)
