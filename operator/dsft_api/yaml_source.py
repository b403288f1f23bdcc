"""YAML as the API server would read it, and the line of every field in it.

PyYAML speaks YAML 1.1 to the letter: `1e-5` is text, `2024-01-01` a date, `1:30` ninety, and of two equal keys the last
one wins in silence. kubectl reads the first as a number and the next two as text; equal keys are refused here.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import yaml

from dsft_api.problem import Path, Problem, field_name

# Far above any manifest. Aliases that multiply each other (a "YAML bomb") or hold themselves end here.
_MAX_NODES = 100_000
_MAX_DEPTH = 64

_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+|0o?[0-7]+)$")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")


class _Loader(yaml.SafeLoader):
    """Resolves plain scalars as Kubernetes does."""


_OURS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OURS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# What JSON can say; !!binary, !!timestamp and the like are refused.
_JSON_TAGS = ("null", "bool", "int", "float", "str", "seq", "map")
_Loader.yaml_constructors = {
    tag: construct
    for tag, construct in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.removeprefix("tag:yaml.org,2002:") in _JSON_TAGS
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))  # pyright: ignore[reportUnknownMemberType]
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))  # pyright: ignore[reportUnknownMemberType]


@dataclass(frozen=True)
class Source:
    """One YAML document: its value, where it stands, and what is wrong with its text."""

    value: object
    problems: tuple[Problem, ...] = ()
    _node: yaml.Node | None = field(default=None, repr=False)

    @property
    def readable(self) -> bool:
        """Whether there is a value to judge, even if its text has problems."""
        return self._node is not None

    def line(self, path: Path) -> int | None:
        """The line, from 1, of the last part of the path that the text has."""
        return None if self._node is None else _line(self._node, path)


def read_yaml(text: str) -> Source:
    """Read the one document of a text. Never raises: what is wrong with the text comes back as problems."""
    try:
        loader = _Loader(text)
        nodes = list(_documents(loader))
        if len(nodes) != 1:
            return _not_one(nodes)
        problems = tuple(_duplicates(nodes[0], (), _Budget()))
        value: object = loader.construct_document(nodes[0])  # pyright: ignore[reportUnknownMemberType]
        return Source(value, problems, nodes[0])
    except yaml.YAMLError as error:
        return Source(None, (_syntax_problem(error),))
    except RecursionError:
        return Source(
            None,
            (Problem("manifest", "is nested too deeply", "write fewer levels, and no alias inside its own anchor"),),
        )


def _documents(loader: _Loader) -> Iterator[yaml.Node]:
    """The documents that hold something: a leading or trailing `---` makes an empty one."""
    while loader.check_node():
        node = loader.get_node()
        if node is not None and node.tag != "tag:yaml.org,2002:null":
            yield node


def _not_one(nodes: list[yaml.Node]) -> Source:
    if not nodes:
        return Source(None, (Problem("manifest", "is empty", "write a DeepSpeedFineTune resource"),))
    line = nodes[1].start_mark.line + 1
    message = f"holds {len(nodes)} documents"
    return Source(None, (Problem("manifest", message, "give each resource a file of its own", line=line),))


def _syntax_problem(error: yaml.YAMLError) -> Problem:
    """The parser's complaint without its snippet of the text, which might show a secret."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be read"
    remedy = (
        "look at this line and the one above: indent with spaces, put a space after ':', quote text with ': ' or ' #'"
    )
    return Problem("manifest", f"is not valid YAML: {what}", remedy, line=None if mark is None else mark.line + 1)


@dataclass
class _Budget:
    nodes: int = _MAX_NODES

    def spend(self, node: yaml.Node) -> None:
        self.nodes -= 1
        if self.nodes < 0:
            raise yaml.MarkedYAMLError(problem="aliases make it far too large", problem_mark=node.start_mark)


def _duplicates(node: yaml.Node, path: Path, budget: _Budget) -> Iterator[Problem]:
    budget.spend(node)
    if len(path) > _MAX_DEPTH:
        raise RecursionError
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _duplicates(item, (*path, index), budget)
    elif isinstance(node, yaml.MappingNode):
        first_lines: dict[str, int] = {}
        for key, value in node.value:
            name = str(key.value)
            line = key.start_mark.line + 1
            if name in first_lines:
                message = f"is written twice, first in line {first_lines[name]}"
                yield Problem(field_name((*path, name)), message, "keep one of the two", line=line)
            first_lines.setdefault(name, line)
            yield from _duplicates(value, (*path, name), budget)


def _line(node: yaml.Node, path: Path) -> int:
    line = node.start_mark.line + 1
    for part in path:
        if isinstance(node, yaml.MappingNode):
            entry = next(((key, value) for key, value in node.value if key.value == part), None)
            if entry is None:
                break
            key, node = entry
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line
