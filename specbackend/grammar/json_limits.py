"""JSON schemas that would take llguidance more stack or time than a request may cost are refused before it sees them.

It bounds its own automata, but not its recursion through a schema and its references, which ends the process when the
stack does, nor the time that it spends on multiples. Measured with 8 MB of stack: it survives twice DEEPEST.
"""

import json
import math
from collections.abc import Iterator
from fractions import Fraction

DEEPEST_NESTING = 64  # objects and arrays, as JSON
DEEPEST = 1024  # nesting times the schemas that can refer to each other
MOST_MEMBERS = 1024  # of one object: the time grows with the square of its optional properties
LONGEST_PATTERNS = 8192  # characters, all together
LARGEST_MULTIPLE = 10_000  # what is a multiple of n needs n states
UNSUPPORTED = "x-guidance"  # llguidance's own options, some of which make it approximate


def check_json_schema(text: str) -> None:
    """Raises ValueError, which says what is too much."""
    try:
        schema = json.loads(text)
    except RecursionError:
        raise ValueError(f"is nested too deeply, at most {DEEPEST_NESTING} levels are served") from None
    if not isinstance(schema, dict):
        raise ValueError("must be a JSON object")
    if UNSUPPORTED in schema:
        raise ValueError(f"{UNSUPPORTED} is not supported")
    _check_members(schema)
    _check_depth(schema)
    _check_multiples(schema)
    _check_patterns(schema)


def _check_members(schema: dict) -> None:
    most = max(len(value) for value, _ in _values(schema) if isinstance(value, dict))
    if most > MOST_MEMBERS:
        raise ValueError(f"has an object of {most} members, at most {MOST_MEMBERS} are served")


def _check_depth(schema: dict) -> None:
    depth = max(level for _, level in _values(schema))
    if depth > DEEPEST_NESTING:
        raise ValueError(f"is nested {depth} levels deep, at most {DEEPEST_NESTING} are served")
    referred = {value["$ref"] for value, _ in _values(schema) if isinstance(value, dict) and _is_reference(value)}
    if depth * (1 + len(referred)) > DEEPEST:
        most = DEEPEST // depth - 1
        raise ValueError(f"refers to {len(referred)} schemas, at most {most} are served with {depth} levels of nesting")


def _is_reference(value: dict) -> bool:
    return isinstance(value.get("$ref"), str)  # else the name of a property


def _check_multiples(schema: dict) -> None:
    """A number may have to be a multiple of several, and so of their least common multiple."""
    multiples = [value.get("multipleOf") for value, _ in _values(schema) if isinstance(value, dict)]
    fractions = [_fraction(multiple) for multiple in multiples if isinstance(multiple, (int, float)) and multiple > 0]
    common = math.lcm(*(fraction.numerator for fraction in fractions))
    if common > LARGEST_MULTIPLE:
        raise ValueError(f"multipleOf: the least common multiple is {common}, at most {LARGEST_MULTIPLE} is served")


def _check_patterns(schema: dict) -> None:
    length = 0
    for value, _ in _values(schema):
        if isinstance(value, dict):
            patterns = [value.get("pattern"), *_members(value.get("patternProperties"))]
            length += sum(len(pattern) for pattern in patterns if isinstance(pattern, str))
    if length > LONGEST_PATTERNS:
        raise ValueError(f"has patterns of {length} characters, at most {LONGEST_PATTERNS} are served")


def _members(value: object) -> list[str]:
    return list(value) if isinstance(value, dict) else []


def _fraction(number: float) -> Fraction:
    """Its digits without the point: 0.25 needs as many states as 25."""
    fraction = Fraction(str(number))
    return fraction if fraction.denominator == 1 else Fraction(str(number).partition("e")[0].replace(".", ""))


def _values(schema: dict) -> Iterator[tuple[object, int]]:
    """All that is in it and how deeply, without recursion."""
    pending: list[tuple[object, int]] = [(schema, 1)]
    while pending:
        value, level = pending.pop()
        yield value, level
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        pending += [(child, level + 1) for child in children if isinstance(child, (dict, list))]
