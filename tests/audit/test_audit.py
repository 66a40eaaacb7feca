"""tools/audit against an engine in this process: content with an exact one, and not with one that has a bug."""

import json
import sys

import pytest
import torch
from audit_report.checks import first_difference
from audit_report.subjects import FLAGS, AuditError, EngineSubject, Question, question_of, read_prompts

from specbackend.speculative import tree_decoder
from specbackend.speculative.verifier import accept_path
from tests.checkpoints import write_head, write_target, write_tokenizer
from tests.speculative.random_trees import lowest_child
from tests.test_tools import load_tool

VOCABULARY = 12
TREE = ["--speculative-num-steps", "2", "--speculative-eagle-topk", "2", "--speculative-num-draft-tokens", "5"]
DRAWS = ["--checks", "distributions", "--draw-prompts", "1", "--draws", "1500", "--draw-tokens", "3"]


@pytest.fixture(scope="module")
def engine_flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("tiny")
    model = write_target(folder / "target", vocab_size=VOCABULARY, num_hidden_layers=7, initializer_range=0.15)
    write_tokenizer(folder / "target", VOCABULARY)
    write_head(folder / "head", "EAGLE3", model.config)
    prompts = [{"input_ids": [number % VOCABULARY, 3, 5]} for number in range(6)] + [{"prompt": "w3 w1 w4"}]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    flags = ["--model-path", str(folder / "target"), "--prompts", str(folder / "prompts.jsonl")]
    flags += ["--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", str(folder / "head"), *TREE]
    return [*flags, "--max-running-requests", "256", "--max-new-tokens", "40"]


@pytest.fixture
def audit(monkeypatch, engine_flags):
    """Call tools/audit with more arguments; returns its exit code."""
    tool = load_tool("audit", monkeypatch)

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["audit", *engine_flags, *arguments])
        return tool.main()

    return call


def test_exact_engine_passes(audit, capsys, tmp_path):
    files = ["--html", str(tmp_path / "report.html"), "--json", str(tmp_path / "report.json")]
    sampling = ["--params", '{"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1}']
    assert audit("--draw-prompts", "2", "--draws", "600", *sampling, *files) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["greedy", "seeded", "distributions"]
    assert "7 prompts, 280 tokens: all equal" in lines[0]
    assert "2 prompts, 600 draws each way, 10 tests: no difference" in lines[2]
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["passed"] and figures["seeded"]["passed"]
    assert figures["greedy"]["speculative"]["steps"] < figures["greedy"]["plain"]["steps"]
    assert [test["what"] for test in figures["distributions"]["tests"][:5]] == [
        *(f"token {position}" for position in range(4)),
        "first 3 jointly",
    ]
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 1 and "DIFFERENT" not in page and "--draws 600" in page
    assert 'href="http' not in page and "src=" not in page and "<script" not in page


def with_wrong_children(share: float):
    """Verification that now and then takes some child for the target's pick."""
    generator = torch.Generator().manual_seed(0)

    def accept(tree, pick_BN):
        wrong_B = torch.rand(len(pick_BN), generator=generator) < share
        pick_BN[:, 0] = pick_BN[:, 0].where(~wrong_B, lowest_child(tree))
        return accept_path(tree, pick_BN)

    return accept


def test_one_wrong_child_in_a_hundred_is_found(audit, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tree_decoder, "accept_path", with_wrong_children(0.01))
    assert audit("--checks", "greedy", "seeded", "--html", str(tmp_path / "report.html")) == 1
    output = capsys.readouterr().out
    assert output.count("DIFFERENT") == 2
    assert "with speculation [" in output
    assert "Where greedy answers differ" in (tmp_path / "report.html").read_text()


def test_favoured_drafts_are_found_by_distribution_alone(audit, capsys, monkeypatch):
    monkeypatch.setattr(tree_decoder, "accept_path", with_wrong_children(0.3))
    assert audit(*DRAWS) == 1
    assert "prompt 0, token 1: p " in capsys.readouterr().out


def test_reused_coin_is_found_by_distribution_alone(audit, capsys, monkeypatch):
    """Each token of a drafted path is distributed as it should be, had it been drawn alone."""
    nodes = tree_decoder.Nodes

    def shallow(token_BN, position_BN, mask_BNN):
        return nodes(token_BN, position_BN.amin(1, keepdim=True).expand_as(position_BN), mask_BNN)

    monkeypatch.setattr(tree_decoder, "Nodes", shallow)
    assert audit(*DRAWS) == 1
    assert "prompt 0, first 3 jointly: p " in capsys.readouterr().out


def test_no_seed_is_in_both_samples(audit, monkeypatch):
    seeds = {True: [], False: []}

    def note(self, prompts, params):
        for each in params:
            seeds[each["speculative"]].append(each["seed"])
        return original(self, prompts, params)

    original = EngineSubject.answer
    monkeypatch.setattr(EngineSubject, "answer", note)
    assert audit("--checks", "distributions", "--draws", "20", "--draw-prompts", "2") == 0
    assert len({*seeds[True], *seeds[False]}) == len(seeds[True] + seeds[False]) == 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "localhost:1"], "name either a server by --url or an engine by --model-path"),
        (["--params", '{"seed": 3}'], "--params: seed is the audit's own to set"),
        (["--params", '{"temperature": 0}'], "at temperature 0 there is nothing to draw"),
        (["--params", '{"top_p": 2}'], "audit: top_p: must be above 0"),
        (["--prompts", "/nowhere"], "No such file"),
        (["--speculative-num-draft-tokens", "40"], "audit: speculative_num_draft_tokens"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_audited_is_named(audit, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        audit(*arguments)
    assert caught.value.code not in (0, None)
    assert message in f"{caught.value.code} {capsys.readouterr().err}"


@pytest.mark.parametrize("check", ["greedy", "seeded", "distributions"])
def test_nothing_is_proved_of_an_engine_that_does_not_speculate(monkeypatch, engine_flags, check):
    tool = load_tool("audit", monkeypatch)
    few = ["--draws", "20", "--draw-prompts", "1", "--max-new-tokens", "8", "--checks", check]
    monkeypatch.setattr(sys, "argv", ["audit", *engine_flags[:4], *few])
    with pytest.raises(SystemExit, match="does not speculate"):
        tool.main()


def test_no_server_at_the_address(monkeypatch, capsys):
    tool = load_tool("audit", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["audit", "--url", "localhost:1"])
    with pytest.raises(SystemExit, match=r"audit: .*failed to connect"):
        tool.main()


def test_prompts_of_all_kinds(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = ['{"input_ids": [1, 2]}', '{"prompt": "a"}', '{"question": "b"}', '{"turns": ["c", "d"]}']
    path.write_text("\n".join(lines))
    assert read_prompts(path) == [[1, 2], "a", "b", "c"]
    path.write_text('{"text": "a"}')
    with pytest.raises(AuditError, match="line 1"):
        read_prompts(path)


def test_parameters_as_a_server_takes_them():
    params = {"top_p": 0.9, "stop": "x", "logit_bias": {"3": 1.5}, "seed": None}
    parameters = {"temperature": 1.0, "top_p": 0.9, "logit_bias": '{"3": 1.5}', **FLAGS}
    assert question_of("text", params) == Question({"text_input": "text", "stop_words": ["x"]}, parameters)
    assert question_of([1, 2], {"temperature": 0}) == Question({"input_ids": [1, 2]}, {"temperature": 0, **FLAGS})


def test_first_difference():
    assert first_difference(0, [1, 2, 3], [1, 2, 3]) is None
    found = first_difference(7, [1, 2, 3, 4, 5, 6, 9, 8], [1, 2, 3, 4, 5, 6, 7, 8])
    assert (found.prompt, found.position, found.before) == (7, 6, [3, 4, 5, 6])
    assert (found.speculative, found.plain) == ([9, 8], [7, 8])
    assert first_difference(0, [1, 2], [1, 2, 3]).position == 2
