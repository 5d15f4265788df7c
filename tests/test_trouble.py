"""Each message has its heading in docs/trouble-shooting.md, and each heading there its message.

A heading (###) is the beginning of a message, word for word, cut wherever it says enough. `...` stands for what is only
known when the message is printed: one word, or at the beginning all words before the first that is fixed. `error: ` is
left out. Messages that begin alike and have the same answer share a heading; of several that fit, the longest counts.

Messages are the texts of the exceptions that the code defines, where they are made, and whatever begins with one of
SAID. A text is read from a string, an f-string, a sum, or both sides of a condition; where it begins with a name or a
call, from what that stands for. One that passes on another exception's text needs no heading. Whatever else the program
says may have one, too.
"""

import ast
import builtins
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import pytest
from conftest import CHECKOUT

pytestmark = pytest.mark.quick

PAGE = "docs/trouble-shooting.md"
FOLDERS = ("fashion_ddp", "launch", "benchmarks", "requirements")
HOLE = "..."
SAID = ("error: ", "warning: ", "note: ", "W&B: ", "PARTIAL: ")
# Groups (##) of the page whose headings are no messages of ours.
NOT_OURS = ("How to read an error", "Symptoms that are no message of ours")
NEVER_SHOWN = ("run.status",)  # of an exception that only tells W&B that its run is not finished


class Text(NamedTuple):
    """What the program may say, from an expression of its source."""

    text: str
    file: str
    node: ast.expr


@dataclass(frozen=True)
class Code:
    """The source of the program, by file."""

    trees: dict[str, ast.Module]

    @cached_property
    def nodes(self) -> list[tuple[str, ast.AST]]:
        return [(file, node) for file, tree in self.trees.items() for node in ast.walk(tree)]

    @cached_property
    def above(self) -> dict[ast.AST, ast.AST]:
        """What each node stands in."""
        return {below: node for _, node in self.nodes for below in ast.iter_child_nodes(node)}

    @cached_property
    def by_name(self) -> dict[tuple[type, str], list[tuple[str, Any]]]:
        """Functions, and calls of them."""
        found = defaultdict(list)
        for file, node in self.nodes:
            if isinstance(node, ast.FunctionDef | ast.Call):
                name = node.name if isinstance(node, ast.FunctionDef) else name_of(node.func)
                found[type(node), name].append((file, node))
        return found

    def named(self, kind: type, name: str, near: ast.AST) -> list[Any]:
        """Those with a name: of the same file, where the name is private."""
        [*_, module] = self.enclosing(near)
        found = self.by_name[kind, name]
        return [node for file, node in found if not name.startswith("_") or self.trees[file] is module]

    @cached_property
    def exceptions(self) -> set[str]:
        """The names of those that the code defines, whatever they are derived from."""
        classes = [node for _, node in self.nodes if isinstance(node, ast.ClassDef)]
        found: set[str] = set()
        while more := {c.name for c in classes if any(is_exception(base, found) for base in c.bases)} - found:
            found |= more
        return found

    # --- What an expression says ------------------------------------------------------------------------------------

    def texts(self, node: ast.AST, depth: int = 4) -> list[str]:
        """What an expression may say; HOLE for what the source does not tell."""
        match node:
            case ast.Constant():
                return [fixed(node)]
            case ast.JoinedStr(values=[ast.Constant(value=label), one, *rest]) if label in SAID:
                return [label + text + "".join(map(fixed, rest)) for text in self.texts(one, depth)]
            case ast.JoinedStr(values=[one, *rest]):
                return [text + "".join(map(fixed, rest)) for text in self.texts(one, depth)]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return [text + fixed(right) for text in self.texts(left, depth)]
            case ast.FormattedValue(value=value):
                return self.texts(value, depth)
            case ast.IfExp(body=one, orelse=other):
                return self.texts(one, depth) + self.texts(other, depth)
            case ast.Name() | ast.Call() if depth:
                found = [text for source in self.sources(node) for text in self.texts(source, depth - 1)]
                if any(len(words(text)) > 2 for text in found):  # one or two words are a value
                    return found
        return [HOLE]

    def sources(self, node: ast.AST) -> list[ast.AST]:
        """The expressions that a name or a call stands for, as far as the source tells."""
        if isinstance(node, ast.Call):
            functions = self.named(ast.FunctionDef, name_of(node.func), node)
            ends = [end for function in functions for end in ast.walk(function)]
            return [end.value for end in ends if isinstance(end, ast.Return) and end.value is not None]
        for scope in self.enclosing(node) if isinstance(node, ast.Name) else ():
            if isinstance(scope, ast.FunctionDef | ast.Module):
                inside = scope.body if isinstance(scope, ast.Module) else ast.walk(scope)
                assigned = [one for one in inside if isinstance(one, ast.Assign)]
                if found := [one.value for one in assigned for to in one.targets if name_of(to) == node.id]:
                    return found
            if isinstance(scope, ast.FunctionDef) and node.id in (names := [one.arg for one in scope.args.args]):
                return list(self._given(scope, names.index(node.id)))
        return []

    def _given(self, function: Any, at: int) -> Iterator[ast.AST]:
        """What is given for an argument wherever the function is called."""
        name, is_method = function.args.args[at].arg, isinstance(self.above[function], ast.ClassDef)
        for call in self.named(ast.Call, function.name, function):
            yield from call.args[at - is_method :][:1]
            yield from (one.value for one in call.keywords if one.arg == name)

    def enclosing(self, node: ast.AST) -> Iterator[ast.AST]:
        """What a node stands in, innermost first."""
        while node in self.above:
            node = self.above[node]
            yield node

    # --- Whose words they are ---------------------------------------------------------------------------------------

    def is_anothers(self, one: Text) -> bool:
        """Whether a text begins with what an exception says, or says nothing else."""
        return self._is_caught(first(one.node)) or (len(words(one.text)) < 2 and self._holds_anothers(one.node))

    def _is_caught(self, node: ast.AST) -> bool:
        """Whether this is the name of an exception that was caught, or handed over."""
        for scope in self.enclosing(node) if isinstance(node, ast.Name) else ():
            if isinstance(scope, ast.ExceptHandler) and scope.name == node.id:
                return True
            if isinstance(scope, ast.FunctionDef):
                return any(a.arg == node.id and is_exception(a.annotation, self.exceptions) for a in scope.args.args)
        return False

    def _holds_anothers(self, node: ast.AST, depth: int = 4) -> bool:
        for one in ast.walk(node):
            if self._is_caught(one) or (isinstance(one, ast.Call) and name_of(one.func) == "join"):  # of several
                return True
            if depth and any(self._holds_anothers(source, depth - 1) for source in self.sources(one)):
                return True
        return False

    # --- What the program says --------------------------------------------------------------------------------------

    @cached_property
    def said(self) -> list[Text]:
        """All texts, but for parts of others and for docstrings."""
        part = ast.JoinedStr | ast.FormattedValue | ast.BinOp | ast.Expr
        texts = [(f, node) for f, node in self.nodes if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp)]
        return [
            Text(text, file, node)
            for file, node in texts
            if not isinstance(self.above[node], part)
            for text in self.texts(node)
        ]

    @cached_property
    def messages(self) -> list[Text]:
        """The texts that need a heading."""
        made = [
            (file, node.args[0])
            for file, node in self.nodes
            if isinstance(node, ast.Call) and node.args and self.exceptions & {*map(name_of, ast.walk(node.func))}
        ]
        raised = [Text(text, file, node) for file, node in made for text in self.texts(node)]
        labelled = [one for one in self.said if one.text.startswith(SAID) and one.text not in SAID]
        return [one for one in raised + labelled if one.text and not self.is_anothers(one)]


def name_of(node: ast.AST | None) -> str:
    return getattr(node, "id", "") or getattr(node, "attr", "")


def is_exception(node: ast.AST | None, ours: set[str]) -> bool:
    kind = getattr(builtins, name_of(node), None)
    return name_of(node) in ours or (isinstance(kind, type) and issubclass(kind, BaseException))


def fixed(node: ast.AST) -> str:
    """What a part of a text says for certain."""
    text = node.value if isinstance(node, ast.Constant) else None
    return re.sub(r"\{\w*\}", HOLE, text) if isinstance(text, str) else HOLE  # {}: as for str.format


def first(node: ast.AST) -> ast.AST:
    """What a text begins with."""
    match node:
        case ast.JoinedStr(values=[ast.Constant(value=label), one, *_]) if label in SAID:
            return first(one)
        case ast.JoinedStr(values=[one, *_]) | ast.FormattedValue(value=one) | ast.BinOp(left=one):
            return first(one)
    return node


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]\w*", text.removeprefix("error: "))


# --- Headings -----------------------------------------------------------------------------------------------------


def opening(text: str) -> str:
    """A text as its heading begins."""
    end_of_another = text.startswith(" ")
    text = " ".join(f"{HOLE * end_of_another}{text.removeprefix('error: ')}".split())
    return re.sub(r"^(\.\.\.\S* )+", f"{HOLE} ", text)


@cache
def pattern(heading: str) -> re.Pattern[str]:
    return re.compile(re.escape(heading).replace(re.escape(HOLE), r"\S+") + r"(?!\w)")


def heading_of(text: str, headings: Iterable[str]) -> str | None:
    """The longest of these headings that a text begins with."""
    return max((heading for heading in headings if pattern(heading).match(opening(text))), key=len, default=None)


def read_headings(page: str) -> dict[str, str]:
    """Each heading of a message, and the group that it stands in."""
    found, group = {}, ""
    for level, title in re.findall(r"^(##|###) (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE):
        if level == "##":
            group = title
        elif group not in NOT_OURS:
            assert title not in found, f"{title} stands there twice"
            assert words(title), f"{title} has no word"
            found[title] = group
    return found


@cache
def program() -> Code:
    files = [path for folder in FOLDERS for path in sorted((CHECKOUT / folder).rglob("*.py"))]
    return Code({str(path.relative_to(CHECKOUT)): ast.parse(path.read_text()) for path in files})


def missing(code: Code, headings: dict[str, str]) -> list[str]:
    """What to add to the page for each message without a heading."""
    found = [(one, heading_of(one.text, headings)) for one in code.messages if words(one.text)]
    groups = defaultdict(Counter)  # that hold each file's other messages
    for one, heading in found:
        groups[one.file].update([headings[heading]] if heading else [])
    lines = []
    for one in (one for one, heading in found if heading is None):
        [(group, _)] = groups[one.file].most_common(1) or [("the group that fits", 0)]
        cut = re.sub(r"((?:\S+ ){3}.*?)(?:[:;,]|(?<!\.)\.) .*", r"\1", opening(one.text))
        lines.append(f"{one.file}:{one.node.lineno}: below ## {group}, add: ### {cut}")
    return lines


def test_each_message_has_a_heading() -> None:
    todo = missing(program(), read_headings((CHECKOUT / PAGE).read_text()))
    assert not todo, f"say in {PAGE} what these mean and what to do:\n" + "\n".join(todo)


def test_each_heading_has_a_message() -> None:
    headings = read_headings((CHECKOUT / PAGE).read_text())
    used = {heading_of(text, headings) for text in {one.text for one in program().said}}
    unused = sorted(headings.keys() - used)
    assert not unused, f"nothing says these any more: remove or mend them in {PAGE}"


def test_each_message_has_words_that_the_source_tells() -> None:
    silent = [one for one in program().messages if not words(one.text)]
    told = [f"{one.file}:{one.node.lineno}: {ast.unparse(one.node)}" for one in silent]
    assert not [line for line in told if not line.endswith(NEVER_SHOWN)], "say it in words where it is raised"


SAMPLE = """
LIMIT = "at most {} of them may be there"
class Ours(RuntimeError): ...
class Other(module.Ours): ...

def reason(path): return f"{path} was found to be empty"
def tell(why): raise Ours(why)

def say(path, error: Exception, n):
    where, value = path, "micro"
    place = f"the folder {path} is read-only"
    raise Ours("a plain one")
    raise Other(f"one derived, at {path}: end")
    raise Ours("a sum " + str(n) + " of parts")
    raise Ours("one side of it" if n else f"the other {n} side")
    raise (Ours if n else Other)(f"{where}: two kinds")
    raise Ours(" is the end of one")
    raise Ours(f"{place}: choose another")
    raise Ours(f"{value} is too large")
    raise Ours(reason(path))
    raise Ours(LIMIT)
    tell(f"told {n} times in a row")
    print(f"error: {place}, as it seems")
    print(f"warning: {n} left")
    raise Ours(n.text)

    raise Ours(f"{path}: {error}")
    raise ValueError("of Python itself")
    print("a word by the way")
    try: ...
    except OSError as caught: raise Ours(f"{caught}; and more of the same")
"""
SAYS = """
told ... times in a row
a plain one
one derived, at ...: end
a sum ... of parts
one side of it
the other ... side
... two kinds
... is the end of one
the folder ... is read-only: choose another
... is too large
... was found to be empty
at most ... of them may be there
...
the folder ... is read-only, as it seems
warning: ... left
"""


def test_a_message_is_read_however_it_is_made() -> None:
    code = Code({"sample.py": ast.parse(SAMPLE)})
    assert code.exceptions == {"Ours", "Other"}
    assert [opening(one.text) for one in code.messages] == SAYS.split("\n")[1:-1]


@pytest.mark.parametrize(
    ("text", "heading"),
    [
        ("...:...: ... is set twice; keep one", "... is set twice"),
        ("error: ... must be a number, got ...", "... must be"),
        ("... cannot be read (...): mend that, or remove it", "... cannot be read (...): mend"),
        ("... cannot be readable", None),
        ("the value must be text", None),  # of more than one word before it
        ("warning: lr must be text", None),
    ],
)
def test_a_text_finds_the_longest_heading_that_it_begins_with(text: str, heading: str | None) -> None:
    headings = ("... must be", "... is set twice", "... cannot be read", "... cannot be read (...): mend")
    assert heading_of(text, headings) == heading


def test_what_is_missing_is_named_with_its_place() -> None:
    code = Code({"sample.py": ast.parse(SAMPLE)})
    headings = dict.fromkeys(SAYS.split("\n")[1:-1], "A group") | {"one derived, at": "A group"}
    for heading in ("one derived, at ...: end", "the folder ... is read-only: choose another", HOLE):
        del headings[heading]
    assert missing(code, headings) == ["sample.py:18: below ## A group, add: ### the folder ... is read-only"]
