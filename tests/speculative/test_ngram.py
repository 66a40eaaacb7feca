"""Prompt lookup proposes what followed the text's last tokens before."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specbackend.batch import Sequences
from specbackend.config import TreeShape
from specbackend.request import Request
from specbackend.speculative.ngram import MAX_OCCURRENCES, NgramDrafter, NgramIndex, TokenTree
from specbackend.speculative.tree_shapes import TreeShapes
from tests.grammar.texts import ids_of, make_compiler, text_of

TEXT = st.lists(st.integers(0, 3), min_size=1, max_size=60)


def ends_by_definition(text: list[int], shortest: int, longest: int) -> list[int]:
    """Where the longest suffixes of the text ended before: longest first, then latest first."""
    found = {}
    for size in range(shortest, min(longest, len(text)) + 1):
        for end in range(size, len(text)):
            if text[end - size : end] == text[-size:]:
                found[end] = size
    return sorted(found, key=lambda end: (-found[end], -end))


@given(TEXT, st.integers(1, 3), st.integers(0, 5), st.integers(1, 60))
@settings(max_examples=300, deadline=None)
def test_matches_are_those_of_the_definition(text, shortest, more, cut):
    index = NgramIndex(shortest)
    index.extend(text[:cut])
    index.extend(text[cut:])  # a text that grows is indexed like one that is there at once
    assert index.matches(shortest + more) == ends_by_definition(text, shortest, shortest + more)


def test_text_that_repeats_itself_is_looked_at_in_bounds():
    index = NgramIndex(1)
    index.extend([7] * 10_000)
    assert len(index.matches(12)) == MAX_OCCURRENCES


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=6), st.integers(2, 12))
@settings(max_examples=300, deadline=None)
def test_token_tree_is_a_tree_of_distinct_siblings(paths, num_nodes):
    tree = TokenTree(9)
    for path in paths:
        tree.add_path(path, num_nodes)
    nodes = range(1, len(tree.tokens))
    assert len(tree.tokens) == len(tree.parents) <= num_nodes
    assert all(tree.parents[node] < node for node in nodes)
    assert len({(tree.parents[node], tree.tokens[node]) for node in nodes}) == len(nodes)
    if paths and len(tree.tokens) < num_nodes:  # then every path fits and can be walked
        edges = {(tree.parents[node], tree.tokens[node]): node for node in nodes}
        for path in paths:
            node = 0
            for token in path:
                node = edges[node, token]


def make_drafter() -> NgramDrafter:
    return NgramDrafter(min_match=1, max_match=4, device="cpu")


def propose_for(requests: list[Request], drafter: NgramDrafter):
    """Tokens and parents of what was drafted, for each request."""
    nothing = torch.zeros(0)  # a drafter without a network does not ask where the KV is
    shapes = TreeShapes.of([request.tree for request in requests], "cpu")
    tree = drafter.propose(Sequences(requests, nothing, nothing, nothing, nothing), None, shapes).tree
    assert tree.token_BN.shape == (len(requests), max(request.tree.num_nodes for request in requests))
    sizes = tree.drafted_BN.sum(1).tolist()
    assert tree.drafted_BN.tolist() == [[node < size for node in range(tree.token_BN.shape[1])] for size in sizes]
    tokens, parents = tree.token_BN.tolist(), tree.parent_BN.tolist()
    return [each[:n] for each, n in zip(tokens, sizes, strict=True)], [
        each[:n] for each, n in zip(parents, sizes, strict=True)
    ]


def request_of(text: list[int], num_nodes: int) -> Request:
    return Request("a", text[:1], output_ids=text[1:], tree=TreeShape(num_nodes - 1, 1, num_nodes))


def propose(texts: list[list[int]], num_nodes: int):
    return propose_for([request_of(text, num_nodes) for text in texts], make_drafter())


def test_longest_match_first_then_other_ways_to_go_on():
    #            1 2 3 was followed by 4 5, 2 3 by 6, 3 alone by 8
    text = [1, 2, 3, 4, 5, 0, 2, 3, 6, 9, 3, 8, 7, 1, 2, 3]
    tokens, parents = propose([text], num_nodes=23)
    assert tokens[0][:14] == [3, *text[3:]]
    assert parents[0][:14] == [0, *range(13)]
    below_the_root = [token for token, parent in zip(tokens[0], parents[0], strict=True) if parent == 0]
    assert below_the_root == [3, 4, 6, 8]


def test_a_match_near_the_end_leaves_room_for_others():
    text = [3, 8, 8, 1, 2, 3, 4, 2, 3]  # 2 3 was followed by 4 2 3, 3 by 8 8 1 2 3 4 2 3
    tokens, parents = propose([text], num_nodes=8)
    assert tokens == [[3, 4, 2, 3, 8, 8, 1, 2]]
    assert parents == [[0, 0, 1, 2, 0, 4, 5, 6]]


def test_text_without_a_match_drafts_nothing():
    tokens, parents = propose([[1, 2, 3], [5, 6, 5]], num_nodes=4)
    assert tokens == [[3], [5, 6, 5]]
    assert parents == [[0], [0, 0, 1]]


def test_each_request_has_a_tree_of_its_own_size():
    text = [1, 2, 3, 4, 5, 6, 1]
    tokens, _ = propose_for([request_of(text, size) for size in (3, 6, 2)], make_drafter())
    assert tokens == [[1, 2, 3], [1, 2, 3, 4, 5, 6], [1, 2]]


def test_a_text_that_grows_is_read_on():
    text = torch.randint(4, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    drafter, request = make_drafter(), request_of(text[:5], 8)
    request.input_ids, request.output_ids = text[:5], []
    for length in (6, 7, 11, 20, 21, 40):  # as steps accept one token or several
        request.output_ids = text[5:length]
        assert propose_for([request], drafter) == propose([text[:length]], 8)


def test_finished_requests_are_forgotten():
    drafter, request = make_drafter(), request_of([1, 2, 1], 4)
    propose_for([request], drafter)
    assert len(drafter._indexes) == 1
    del request
    assert len(drafter._indexes) == 0


def test_a_path_ends_before_the_first_token_that_the_grammar_forbids(tmp_path):
    text = ids_of("xab1 xab2 x")
    request = request_of(text, 6)
    tokens, parents = propose_for([request], make_drafter())
    assert text_of(tokens[0][:5]) == "xab2 "
    request.grammar = make_compiler(tmp_path).start("regex", "xab[^2]*")
    request.grammar.advance(text[-1])
    tokens, parents = propose_for([request], make_drafter())
    assert text_of(tokens[0][:4]) == "xab1" and 2 not in parents[0][4:], "the other path ends where 2 would follow"
    assert request.grammar.legal_after(tuple(ids_of("b"))) is None, "the state is where it was"
