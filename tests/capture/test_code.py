"""Digests of code follow from what it does alone."""

import os
import subprocess
import sys
from itertools import combinations

import pytest

from splitpoint.capture.code import class_digest, code_digest, function_digest

CONSTANTS = [
    *("1", "2", "1.0", "True", "'1'", "b'1'", "None", "...", "1j", "-1j", "0.0", "-0.0"),
    *("''", "'a'", "'ab'", "b'ab'", "10**30", "'\\udc80'", "(1,)", "(1.0,)", "(True,)", "((1,),)"),
    *("(1, 2)", "((1,), 2)", "('tuple', 1)", "('code', 'a')", "('ellipsis', 'Ellipsis')"),
    *(
        "x in {1, 2}",
        "x in {1, 3}",
        "x in {'1', '2'}",
        "x in {(1, 2), 3}",
        "lambda: 1",
        "lambda: 2",
    ),
]


def made(text, filename="here.py"):
    scope = {}
    exec(compile(text, filename, "exec"), scope)
    return scope["f"]


@pytest.mark.parametrize("constant", CONSTANTS)
def test_a_constant_is_told_from_all_others_and_not_from_itself(constant):
    digest = function_digest(made(f"def f(x): return {constant}"))
    assert digest == function_digest(made(f"\n\ndef f(x): return {constant}", "there.py"))
    others = [function_digest(made(f"def f(x): return {c}")) for c in CONSTANTS if c != constant]
    assert digest not in others


PARTS = {
    "a name": "def f(x): return y",
    "an attribute": "def f(x): return x.y",
    "another name of an argument": "def f(z): return z",
    "a default": "def f(x=1): return x",
    "another default": "def f(x=2): return x",
    "a keyword": "def f(*, x): return x",
    "a position": "def f(x, /): return x",
    "an operator": "def f(x): return x + 1",
    "another operator": "def f(x): return x - 1",
    "a generator": "def f(x): yield x",
    "an exception that is caught": "def f(x):\n    try: return x\n    except KeyError: return 1",
    "code within": "def f(x):\n    def g(): return x\n    return g",
    "other code within": "def f(x):\n    def g(): return x()\n    return g",
}


def test_what_code_does_is_told_apart():
    digests = {what: function_digest(made(text)) for what, text in PARTS.items()}
    for a, b in combinations(digests, 2):
        assert digests[a] != digests[b], (a, b)


def test_equal_objects_and_the_same_one_are_alike():
    """marshal, as of later versions, writes an object met before as a reference."""
    code = made("def f(x): return 'one two', 'three', b'four', 12345678").__code__
    (text,) = [c for c in code.co_consts if type(c) is tuple]
    copy = (*("".join(list(each)) for each in text[:2]), bytes(bytearray(text[2])), int("12345678"))
    assert copy == text
    assert not any(a is b for a, b in zip(copy, text, strict=True))
    consts = tuple(copy if c is text else c for c in code.co_consts)
    assert code_digest(code.replace(co_consts=consts)) == code_digest(code)
    assert code_digest(code.replace(co_consts=(*consts[:-1], (*copy[:3], 1)))) != code_digest(code)


CLASS = """
import functools
class f:
    number = {number}
    def plain(self): return {plain}
    @staticmethod
    def static(): return {static}
    @classmethod
    def of_class(cls): return {of_class}
    @property
    def asked(self): return {asked}
    @functools.cached_property
    def kept(self): return {kept}
    part = functools.partial(lambda x: {part}, 1)
    @functools.wraps(plain)
    def wrapping(self): return {wrapping}
"""
FIELDS = ("number", "plain", "static", "of_class", "asked", "kept", "part", "wrapping")


def test_each_part_of_a_class_is_in_its_digest():
    plain = dict.fromkeys(FIELDS, 1)
    digests = {class_digest(made(CLASS.format(**{**plain, name: 2}))) for name in FIELDS}
    digests.add(class_digest(made(CLASS.format(**plain))))
    assert len(digests) == len(FIELDS) + 1
    assert class_digest(made(CLASS.format(**plain), "there.py")) in digests


def test_another_process_comes_to_the_same():
    text = f"def f(x): return x in {{'a', 'b', 'c', 'd'}}, {', '.join(CONSTANTS[:-2])}"
    script = f"""
from splitpoint.capture.code import function_digest
exec(compile({text!r}, "elsewhere.py", "exec"))
print(function_digest(f))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == function_digest(made(text))
