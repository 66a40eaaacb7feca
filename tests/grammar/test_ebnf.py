"""EBNF means what xgrammar and llama.cpp say it means."""

import re

import numpy as np
import pytest

from specbackend.grammar.ebnf import DEEPEST_NESTING, LARGEST_REPETITION, MOST_RULES, ebnf_to_lark
from tests.grammar.texts import END_ID, ids_of, make_compiler


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    return make_compiler(tmp_path_factory.mktemp("bytes"))


def derives(compiler, grammar: str, text: str) -> bool:
    state = compiler.start("ebnf", grammar)
    path = tuple(ids_of(text))
    legal = state.legal_after(path)
    return legal is not None and bool(np.isin(END_ID, np.flatnonzero(legal)))


DERIVED = [  # grammar, texts of it, texts that are not
    ('root ::= "a" | "b"', ["a", "b"], ["", "ab", "c"]),
    ('root ::= "a"\n  | "b" # comment\n\n| "c"', ["a", "b", "c"], ["#"]),
    ('root ::= x y-z?\nx ::= "x"\ny-z ::= "y"', ["x", "xy"], ["y", "xyy"]),
    ('root ::= ("ab" | "c")+ [0-9]{2,3}', ["abc12", "c123"], ["12", "ab1", "c1234"]),
    ('root ::= "x"{2} "y"{1,} "z"{0, 1}', ["xxy", "xxyyyz"], ["xy", "xxz"]),
    ('root ::= [^a-c\\]"]+', ["d[é\n", "-"], ["a", "b", "]", '"', ""]),
    ("root ::= [-a] [b-] [\\^x]", ["--^", "abx"], ["bbx", "a-\\"]),
    ("root ::= . .", ["é\n", "a\0"], ["a"]),
    (r'root ::= "\n\t\"\\\x41\u00e9\U0001F600"', ['\n\t"\\Aé😀'], ["n"]),
    (r"root ::= [\x41-\x43\u00e9]", ["B", "é"], ["\\", "u"]),
    ('root ::= "{}/" [{}/]', ["{}/{", "{}//"], ["{}/"]),
    ('root ::= "" | "b"', ["", "b"], ["bb"]),
    ('root ::= "(" root ")" | "x"', ["x", "((x))"], ["", "(x", "()"]),
    ('root ::= [ab]* "b"', ["b", "aab", "abbb"], ["a", ""]),  # as a regular expression: a greedy lexer fails on it
    ('root ::= x "c" | y "d"\nx ::= [a] [b]\ny ::= "ab"', ["abc", "abd"], ["ab"]),
    ('root ::= "[" (root ("," root)*)? "]" | n\nn ::= [0-9]+', ["[]", "[1,[22,3]]", "7"], ["[,]", "[1,]"]),
]


@pytest.mark.parametrize("grammar, derived, others", DERIVED, ids=[grammar[:30] for grammar, *_ in DERIVED])
def test_derives(compiler, grammar, derived, others):
    assert [text for text in derived if not derives(compiler, grammar, text)] == []
    assert [text for text in others if derives(compiler, grammar, text)] == []


REFUSED = {
    "": "no rule named root",
    'Root ::= "a"': "no rule named root",
    "root ::= other": "root refers to other, which is no rule",
    'root ::= "a"\nroot ::= "b"': "defines root twice",
    'root ::= "a"\n"b" ::= "c"': "line 2, at '::= \"c\"': expected a name",
    'root "a"': "expected a ::=",
    'root ::= ("a"': "line 1, at '(\"a\"': this group is not closed",
    'root ::= "a': "cannot be read",
    "root ::= [a": "cannot be read",
    "root ::= []": "this class is empty",
    'root ::= "\\q"': r"\q is no escape sequence",
    'root ::= "\\ud800"': "is no escape sequence",
    "root ::= | ) x": "expected a name",
    "start: /a/": "line 1, at ': /a/': cannot be read",
    "root ::= " + "(" * 1000 + '"a"' + ")" * 1000: f"more than {DEEPEST_NESTING} levels",
    'root ::= "a"{10001}': f"at most {LARGEST_REPETITION}",
    "\n".join(f'r{index} ::= "a"' for index in range(MOST_RULES + 1)): f"more than {MOST_RULES} rules",
}


@pytest.mark.parametrize("grammar", REFUSED, ids=[grammar[:20] for grammar in REFUSED])
def test_refusals_say_what_is_wrong(grammar):
    with pytest.raises(ValueError, match=re.escape(REFUSED[grammar])):
        ebnf_to_lark(grammar)


def test_rules_without_recursion_become_terminals():
    lark = ebnf_to_lark('root ::= "(" root ")" | a\na ::= b+\nb ::= "b"')
    assert lark.splitlines() == ["start: r0", 'r0: "(" r0 ")" | T1', "T1: T2+", 'T2: "b"']
