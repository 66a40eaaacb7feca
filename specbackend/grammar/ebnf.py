r"""EBNF as xgrammar, SGLang and llama.cpp (GBNF) write it, into the Lark that llguidance reads.

    root ::= "(" root ")" | number     # literals with \n \t \" \\ \xHH \uHHHH \UHHHHHHHH; comments
    number ::= [0-9]{1,3} ("." [^a-z.])? .*

Rules that do not lead back to themselves become terminals, regular expressions in effect: a grammar without recursion
is matched exactly, whatever its ambiguities. In a grammar with recursion a terminal takes as many characters as it can,
as in Lark: all that is generated is derived from `root`, but not all that could be derived is generated.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

MOST_RULES = 256
DEEPEST_NESTING = 64
LARGEST_REPETITION = 10_000

_TOKEN = re.compile(
    r"""(?P<space>(?:\s|\#[^\n]*)+)
    | (?P<define>::=)
    | (?P<name>[A-Za-z_][\w-]*)
    | (?P<literal>"(?:[^"\\\n]|\\.)*")
    | (?P<class>\[(?:[^\]\\\n]|\\.)*\])
    | (?P<repeat>\{\s*\d+\s*(?:,\s*\d*\s*)?\} | [*+?])
    | (?P<mark>[|().])""",
    re.VERBOSE,
)
_CHARACTER = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))|([^\\])", re.DOTALL)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", **{char: char for char in "\\\"'[]-^/"}}
_ANY = r"/[\x{0}-\x{10ffff}]/"


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    position: int


@dataclass(frozen=True)
class _Rule:
    lark: str  # with the names of other rules in {}
    references: frozenset[str]


def ebnf_to_lark(text: str) -> str:
    """Raises ValueError, which says what is wrong and where."""
    rules = _Parser(text).rules()
    if "root" not in rules:
        raise ValueError("has no rule named root")
    for name, rule in rules.items():
        for missing in sorted(rule.references - rules.keys()):
            raise ValueError(f"{name} refers to {missing}, which is no rule")
    terminals = _without_recursion(rules)
    names = {name: f"{'T' if name in terminals else 'r'}{index}" for index, name in enumerate(rules)}
    lines = [f"{names[name]}: {rule.lark.format_map(names)}" for name, rule in rules.items()]
    return "\n".join([f"start: {names['root']}", *lines])


def _without_recursion(rules: dict[str, _Rule]) -> set[str]:
    """Rules that are made of nothing but such rules."""
    users: dict[str, list[str]] = {name: [] for name in rules}
    for name, rule in rules.items():
        for reference in rule.references:
            users[reference].append(name)
    open_references = {name: len(rule.references) for name, rule in rules.items()}
    found = [name for name, count in open_references.items() if not count]
    for name in found:  # grows as it goes
        for user in users[name]:
            open_references[user] -= 1
            if not open_references[user]:
                found.append(user)
    return set(found)


class _Parser:
    """Recursive descent; each method returns Lark and leaves `_at` behind what it read."""

    def __init__(self, text: str):
        self._text = text
        self._tokens = [*_tokens(text), _Token("end", "", len(text))]
        self._at = 0
        self._depth = 0
        self._references: set[str] = set()

    def rules(self) -> dict[str, _Rule]:
        rules: dict[str, _Rule] = {}
        while self._kind() != "end":
            name = self._take("name").text
            self._take("define")
            self._references = set()
            lark = self._alternatives()
            if name in rules:
                raise ValueError(f"defines {name} twice")
            rules[name] = _Rule(lark, frozenset(self._references))
            if len(rules) > MOST_RULES:
                raise ValueError(f"has more than {MOST_RULES} rules, the most that are served")
        return rules

    def _alternatives(self) -> str:
        sequences = [self._sequence()]
        while self._mark() == "|":
            self._at += 1
            sequences.append(self._sequence())
        return " | ".join(sequences)

    def _sequence(self) -> str:
        items = []
        while self._starts_item():
            items.append(self._item() + self._repetition())
        return " ".join(items) or '""'

    def _starts_item(self) -> bool:
        """A name before ::= begins the next rule."""
        kind = self._kind()
        if kind == "name":
            return self._tokens[self._at + 1].kind != "define"
        return kind in ("literal", "class") or self._mark() in ("(", ".")

    def _item(self) -> str:
        token = self._tokens[self._at]
        self._at += 1
        if token.kind == "literal":
            return _braces_doubled(json.dumps("".join(self._characters(token))))
        if token.kind == "class":
            return _braces_doubled(self._character_class(token))
        if token.kind == "name":
            self._references.add(token.text)
            return f"{{{token.text}}}"
        return _braces_doubled(_ANY) if token.text == "." else self._group(token)

    def _group(self, opening: _Token) -> str:
        self._depth += 1
        if self._depth > DEEPEST_NESTING:
            raise ValueError(f"is nested more than {DEEPEST_NESTING} levels deep, the most that are served")
        inner = self._alternatives()
        if self._mark() != ")":
            raise self._error(opening, "this group is not closed")
        self._at += 1
        self._depth -= 1
        return f"({inner})"

    def _repetition(self) -> str:
        if self._kind() != "repeat":
            return ""
        token = self._take("repeat")
        counts = [int(count) for count in re.findall(r"\d+", token.text)]
        if max(counts, default=0) > LARGEST_REPETITION:
            raise ValueError(f"repeats {max(counts)} times, at most {LARGEST_REPETITION} are served")
        return _braces_doubled(re.sub(r"\s", "", token.text))

    def _character_class(self, token: _Token) -> str:
        """As a regular expression with all characters by number."""
        negated = token.text.startswith("[^")
        parts = []
        for char, escaped in self._decoded(token, token.text[1 + negated : -1]):
            parts.append("-" if char == "-" and not escaped and parts else f"\\x{{{ord(char):x}}}")
        if not parts:
            raise self._error(token, "this class is empty")
        if parts[-1] == "-":  # at the end it stands for itself
            parts[-1] = r"\x{2d}"
        return f"/[{'^' if negated else ''}{''.join(parts)}]/"

    def _characters(self, token: _Token) -> Iterator[str]:
        return (char for char, _ in self._decoded(token, token.text[1:-1]))

    def _decoded(self, token: _Token, text: str) -> Iterator[tuple[str, bool]]:
        """Characters, and whether they were escaped."""
        for match in _CHARACTER.finditer(text):
            *codes, letter, plain = match.groups()
            code = next((int(digits, 16) for digits in codes if digits), None)
            if plain is not None:
                yield plain, False
            elif code is not None and code < 0x110000 and not 0xD800 <= code < 0xE000:
                yield chr(code), True
            elif letter in _ESCAPES:
                yield _ESCAPES[letter], True
            else:
                raise self._error(token, f"{match[0]} is no escape sequence")

    def _kind(self) -> str:
        return self._tokens[self._at].kind

    def _mark(self) -> str | None:
        token = self._tokens[self._at]
        return token.text if token.kind == "mark" else None

    def _take(self, kind: str) -> _Token:
        token = self._tokens[self._at]
        if token.kind != kind:
            raise self._error(token, f"expected a {'::=' if kind == 'define' else kind}")
        self._at += 1
        return token

    def _error(self, token: _Token, message: str) -> ValueError:
        return _error_at(self._text, token.position, message)


def _tokens(text: str) -> Iterator[_Token]:
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise _error_at(text, position, "cannot be read")
        if match.lastgroup != "space":
            yield _Token(match.lastgroup, match[0], position)
        position = match.end()


def _error_at(text: str, position: int, message: str) -> ValueError:
    line = text.count("\n", 0, position) + 1
    return ValueError(f"line {line}, at {text[position : position + 20]!r}: {message}")


def _braces_doubled(lark: str) -> str:
    """So that str.format leaves them alone."""
    return lark.replace("{", "{{").replace("}", "}}")
