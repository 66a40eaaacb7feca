"""A look at the prefix cache for people: how large its parts are and how they are used, never what they say."""

from collections.abc import Iterator
from dataclasses import dataclass

from specbackend.cache.radix_tree import RadixNode, RadixTree


@dataclass(frozen=True)
class NodeView:
    id: int  # the same in every view for as long as the node is there
    parent: int | None  # None: a text begins with it
    num_tokens: int
    subtree_tokens: int  # its own and those of all nodes below it
    locks: int  # requests that use it
    age: int  # times that the cache was used since it was
    hits: int


@dataclass(frozen=True)
class TreeView:
    num_nodes: int
    num_tokens: int
    locked_tokens: int
    nodes: list[NodeView]  # the largest with all that is below them, parents before children


def view(tree: RadixTree, limit: int) -> TreeView:
    """At most `limit` nodes. No node comes without its parent, whose subtree is larger than its own.

    Takes some microseconds per node of the tree, or no time if none are asked for.
    """
    return TreeView(tree.num_nodes, tree.num_slots, tree.num_locked, _largest(tree, limit) if limit else [])


def _largest(tree: RadixTree, limit: int) -> list[NodeView]:
    nodes = list(_walk(tree))
    subtree_tokens = {node: len(node.slots) for node in nodes}
    for node in reversed(nodes):
        if node.parent in subtree_tokens:
            subtree_tokens[node.parent] += subtree_tokens[node]
    now = max((node.last_used for node in nodes), default=0)
    largest = sorted(nodes, key=lambda node: -subtree_tokens[node])[:limit]  # stable: of equals the parent comes first
    return [_view(node, subtree_tokens[node], now) for node in largest]


def _walk(tree: RadixTree) -> Iterator[RadixNode]:
    """All nodes but the roots, parents before children."""
    waiting = [child for root in tree.roots.values() for child in root.children.values()]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += node.children.values()


def _view(node: RadixNode, subtree_tokens: int, now: int) -> NodeView:
    parent = node.parent.number if node.parent.parent else None
    return NodeView(node.number, parent, len(node.slots), subtree_tokens, node.locks, now - node.last_used, node.hits)
