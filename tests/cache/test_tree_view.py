"""What people see of the prefix cache: sizes and use, in every tree."""

from hypothesis import given
from hypothesis import strategies as st

from specbackend.cache import tree_view
from specbackend.cache.radix_tree import RadixTree

TEXTS = st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=8), st.sampled_from([None, "salt"])))


def tree_of(texts) -> RadixTree:
    tree = RadixTree()
    for keys, salt in texts:
        tree.insert(keys, [0] * len(keys), salt)
    return tree


@given(TEXTS, st.integers(0, 12))
def test_the_largest_nodes_come_and_none_without_its_parent(texts, limit):
    tree = tree_of(texts)
    whole, part = tree_view.view(tree, 1000), tree_view.view(tree, limit)
    assert whole.num_tokens == sum(node.num_tokens for node in whole.nodes) == tree.num_slots
    assert len(whole.nodes) == len({node.id for node in whole.nodes}) == whole.num_nodes == part.num_nodes
    for node in whole.nodes:
        below = sum(child.subtree_tokens for child in whole.nodes if child.parent == node.id)
        assert node.subtree_tokens == node.num_tokens + below
    assert len(part.nodes) == min(limit, whole.num_nodes)
    seen = {None}
    for node in part.nodes:
        assert node.parent in seen
        seen.add(node.id)
    left_out = [node.subtree_tokens for node in whole.nodes if node.id not in seen]
    assert max(left_out, default=0) <= min((node.subtree_tokens for node in part.nodes), default=1000)


def test_use_shows():
    tree = tree_of([([1, 2, 3], None), ([1, 2, 4, 5], None)])
    tree.lock(tree.match([1, 2, 3]).node)
    view = tree_view.view(tree, 10)
    top, long, short = view.nodes
    assert (top.num_tokens, top.parent, top.locks, top.age, top.hits) == (2, None, 1, 0, 1)
    assert (long.num_tokens, long.parent, long.locks, long.hits) == (2, top.id, 0, 0)
    assert (short.num_tokens, short.parent, short.locks, short.age) == (1, top.id, 1, 0)
    assert long.age > 0 and view.locked_tokens == 3
    tree.insert([1, 2, 3, 6], [0] * 4)
    assert {node.id for node in view.nodes} < {node.id for node in tree_view.view(tree, 10).nodes}
