"""Jinja templates of strangers, rendered as transformers renders chat templates, and bounded.

A chat template comes with a checkpoint of anybody. Jinja's sandbox keeps it from files and from Python's insides, not
from loops without end or texts without measure. Here each step and each value is counted while it renders: a template
is refused after so much work, which depends on it and its conversation alone and not on the machine or the time.

What is counted: passes of loops, calls, filters, tests, operators, comparisons and output, each with the values that
it takes and makes. What could make much out of little in one step (a width, a repetition, a replacement) is estimated
before it is done, and no value may be nested so that it would be endless when printed.
"""

import functools
import inspect
import json
import re
import threading
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, MappingView, ValuesView
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

# What one rendering may do: so much, and so much for each character and element of its conversation. The templates that
# people have take some tens of steps a message.
_STEPS, _STEPS_EACH = 250_000, 16
_SIZE, _SIZE_EACH = 1_000_000, 256

_LARGEST = 1 << 28  # characters or elements that one operation may make
_DEEPEST = 100  # calls within calls
_LONGEST_INT = 1 << 14  # bits

# Whose result may be as large as the product of what they are given; the names of filters and of methods.
_MULTIPLYING = {
    *("batch", "center", "expandtabs", "indent", "join", "ljust", "replace", "rjust", "round", "slice", "to_bytes"),
    *("tojson", "translate", "urlize", "wordwrap", "xmlattr", "zfill"),
}
_QUADRATIC = {"striptags", "urlize"}  # in the length of a text
# Filters and tests that look no deeper than at a value's own elements; all others may print it, or compare it in full.
_SHALLOW = {
    *(
        "length",
        "count",
        "first",
        "last",
        "list",
        "reverse",
        "items",
        "default",
        "d",
        "attr",
        "batch",
        "slice",
        "random",
    ),
    *("map", "select", "selectattr", "reject", "rejectattr"),
    *("defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "number", "boolean", "integer"),
    *("float", "true", "false", "callable", "sameas", "filter", "test", "odd", "even", "divisibleby"),
}
# Methods and functions that do look deeper.
_DEEP = {"format", "format_map", "join", "index", "count", "changed", "fromkeys", "_Dictionary"}
_FORMATTING = {"format", "format_map", "strftime_now"}
_WIDE_PERCENT = re.compile(r"%(?:\([^)%]*\))?[^a-zA-Z%]*(?:\d{4}|\*)")
_WIDE_BRACES = re.compile(r"\{[^{}:]*:[^{}]*?(?:\d{4}|\{)")


class TooMuchError(Exception):
    """A template does more than it may; says what."""


class RaisedError(jinja2.TemplateError):
    """A template refused by itself what it was given: its `raise_exception`."""


class Rendering:
    """The account of one rendering.

    Args:
        given: What the template is given; it may do more with more.
    """

    def __init__(self, given: Any) -> None:
        self.written = 0
        """Characters of the text so far."""
        self.marked: list[tuple[int, int]] = []
        """Where in the text `{% generation %}` stood: first character, and the one behind the last."""
        self.depth = 0
        self._known: dict[int, tuple[Any, int]] = {}  # by identity; the value stays, so that its name does
        weight = self._weight(given)
        self._most = self._steps = _STEPS + _STEPS_EACH * weight
        self._size = _SIZE + _SIZE_EACH * weight

    def spend(self, size: int = 0) -> bool:
        """Count one step and what it handles.

        Raises:
            TooMuchError: there is nothing left.
        """
        self._steps -= 1
        self._size -= size
        if self._steps < 0:
            raise TooMuchError(f"takes more than {self._most:,} steps; it loops without end, or nearly so")
        if self._size < 0:
            raise TooMuchError("makes texts or lists without measure")
        return True

    def walked(self, value: Any) -> Any:
        """The same value, counted in full."""
        self.spend(self._weight(value))
        return value

    def made(self, value: Any) -> Any:
        """The same value, its own elements counted; what comes out of a generator is counted as it comes."""
        if self._weight(value) > self._size:
            raise TooMuchError("makes texts or lists without measure")
        self.spend(self._elements(value))
        return self._counted(value) if inspect.isgenerator(value) else value

    def allow(self, name: str, values: list[Any], *, deep: bool) -> None:
        """Count what an operation is given, and refuse one that could make too much of it.

        Args:
            name: Of the filter, test, method or function.
            values: What it is given; of a method, first of all whose it is.
            deep: Whether it looks at all that they hold.
        """
        self.spend(sum(map(self._weight if deep else self._elements, values)))
        if name in _FORMATTING and values:
            _require_narrow(values[0])
        if name in _MULTIPLYING | _QUADRATIC:
            first, second = ([*sorted(map(self._extent, values), reverse=True), 0, 0])[:2]
            if name in _QUADRATIC:
                self.spend(first * first >> 10)
            if (1 + first) * (1 + second) > min(_LARGEST, self._size):
                raise TooMuchError(f"makes texts or lists without measure ({name})")

    def allow_operator(self, operator: str, left: Any, right: Any) -> None:
        """The same for an operator between two values."""
        formats = operator == "%" and isinstance(left, str | bytes)
        self.spend(self._elements(left) + (self._weight(right) if formats else self._elements(right)))
        if formats:
            _require_narrow(left)
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and numbers and left.bit_length() * abs(right) > _LONGEST_INT:
            raise TooMuchError("makes numbers without measure (**)")
        if operator == "*" and not numbers and self._extent(left) * self._extent(right) > min(_LARGEST, self._size):
            raise TooMuchError("makes texts or lists without measure (*)")

    def _counted(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            yield self.made(value)

    def _extent(self, value: Any) -> int:
        if isinstance(value, int):
            return abs(value)
        return self._most if inspect.isgenerator(value) else self._weight(value) - 1

    def _elements(self, value: Any) -> int:
        """Characters of a text, elements of a container: what an operation copies that looks no deeper."""
        if isinstance(value, tuple):  # may be a key, which is hashed in full
            return self._weight(value)
        return 1 + len(value) if isinstance(value, str | bytes | range | Mapping | MappingView | list | set) else 1

    def _weight(self, value: Any) -> int:
        """Characters and elements of a value, as often as each would be printed; each container is walked once."""
        if isinstance(value, str | bytes):
            return 1 + len(value)
        if isinstance(value, int) and value.bit_length() > _LONGEST_INT:
            raise TooMuchError("makes numbers without measure")
        if isinstance(value, range):
            return 1 + len(value)
        if isinstance(value, KeysView | ValuesView | ItemsView):
            value = [*value]
        if not isinstance(value, Mapping | list | tuple | set):
            return 1
        if id(value) not in self._known:
            parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
            weight = 1 + sum(1 if part is None else self._weight(part) for part in parts)
            self._known[id(value)] = value, weight
        return self._known[id(value)][1]


def _require_narrow(template: Any) -> None:
    """Refuse a format whose widths have four digits or stand in the values."""
    if isinstance(template, bytes):
        template = template.decode("latin-1")
    if isinstance(template, str) and (_WIDE_PERCENT.search(template) or _WIDE_BRACES.search(template)):
        raise TooMuchError("pads texts without measure")


class _Counting(NodeTransformer):
    """Puts calls into a template that count what its code does by itself: what goes through no method of ours."""

    def generic_visit(self, node: nodes.Node, *values: Any, **named: Any) -> Any:
        super().generic_visit(node, *values, **named)
        match node:
            case nodes.Output():
                written = sum(len(part.data) for part in node.nodes if isinstance(part, nodes.TemplateData))
                node.nodes = [part if isinstance(part, nodes.TemplateData) else _walked(part) for part in node.nodes]
                return [_statement(written, node), node]
            case nodes.For(test=None):
                node.body.insert(0, _statement(0, node))
            case nodes.For():  # whose test may leave out every pass
                node.test = nodes.And(_call("spend", nodes.Const(0), node), node.test).set_lineno(node.lineno)
            case nodes.Compare():
                node.expr = _walked(node.expr)
                for operand in node.ops:
                    operand.expr = _walked(operand.expr)
            case nodes.Concat():
                node.nodes = [_walked(part) for part in node.nodes]
                return _made(node)
            case nodes.Dict():
                return _walked(node)
            case nodes.Tuple(ctx="load") | nodes.List() | nodes.Getitem(arg=nodes.Slice()):
                return _made(node)
            case nodes.Getitem() if not isinstance(node.arg, nodes.Const):
                node.arg = _walked(node.arg)
        return node


def _call(method: str, argument: nodes.Expr, near: nodes.Node) -> nodes.Call:
    call = nodes.Call(nodes.EnvironmentAttribute(method), [argument], [], None, None)
    call.set_lineno(near.lineno)
    return call


def _walked(node: nodes.Expr) -> nodes.Call:
    return _call("walked", node, node)


def _made(node: nodes.Expr) -> nodes.Call:
    return _call("made", node, node)


def _statement(size: int, near: nodes.Node) -> nodes.Node:
    return nodes.ExprStmt(_call("spend", nodes.Const(size), near)).set_lineno(near.lineno)


class _Marking(Extension):
    """`{% generation %}`, with which a template says what the assistant writes."""

    tags: set[str] = {"generation"}  # noqa: RUF012  # as the base class declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        rendering: Rendering = self.environment.rendering  # type: ignore[attr-defined]  # a `_Environment`
        text = caller()
        rendering.marked.append((rendering.written, rendering.written + len(text)))
        return text


class _Dictionary:
    """`dict`, without what Python's own class would hand out."""

    def __call__(self, *values: Any, **named: Any) -> dict[Any, Any]:
        return dict(*values, **named)

    def fromkeys(self, *values: Any) -> dict[Any, Any]:
        return dict.fromkeys(*values)


class _Namespace(Namespace):
    """`namespace`, without names that Python keeps for itself, and without its content where it is printed."""

    def __init__(self, /, *values: Any, **named: Any) -> None:
        attributes = dict(*values, **named)
        for name in attributes:
            _require_public(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _require_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name with an underscore in front: {name!r}")


def raise_exception(message: str) -> None:
    """Refuse what the template was given."""
    raise RaisedError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is: Jinja's own filter escapes what HTML would read."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Environment(ImmutableSandboxedEnvironment):
    """What a template is compiled in and sees; `rendering` is the account that is open."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, now: Callable[[], datetime]) -> None:
        # Not optimized: constants would be worked out while compiling, uncounted.
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Marking, loopcontrols])
        self.rendering = Rendering(None)
        self.filters["tojson"] = _to_json
        tables: tuple[dict[str, Any], ...] = (self.filters, self.tests)
        for functions in tables:
            functions |= {name: self._guarded(name, function) for name, function in functions.items()}

        def strftime_now(form: str) -> str:
            return now().strftime(form)

        self.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": strftime_now,
            "dict": _Dictionary(),
            "namespace": _Namespace,
        }
        del self.globals["lipsum"]  # random filler text

    def spend(self, size: int) -> bool:
        return self.rendering.spend(size)

    def walked(self, value: Any) -> Any:
        return self.rendering.walked(value)

    def made(self, value: Any) -> Any:
        return self.rendering.made(value)

    def call(self, context: Any, function: Any, /, *values: Any, **named: Any) -> Any:
        if getattr(function, "__self__", None) is self:  # a call that `_Counting` put in
            return function(*values)
        rendering = self.rendering
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        given = [value for name, value in named.items() if name not in ("_loop_vars", "_block_vars")]
        name = getattr(function, "__name__", None) or type(function).__name__
        rendering.allow(name, [*([] if owner is None else [owner]), *values, *given], deep=name in _DEEP)
        rendering.depth += 1
        if rendering.depth > _DEEPEST:
            raise TooMuchError(f"calls itself more than {_DEEPEST} levels deep")
        result = rendering.made(super().call(context, function, *values, **named))
        rendering.depth -= 1
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.rendering.allow_operator(operator, left, right)
        return self.rendering.made(super().call_binop(context, operator, left, right))

    def _generate(self, source: nodes.Template, *arguments: Any, **options: Any) -> str:
        return super()._generate(_Counting().visit(source), *arguments, **options)

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        takes_context = hasattr(function, "jinja_pass_arg")

        @functools.wraps(function)  # with the mark of those that take the context
        def guarded(*values: Any, **named: Any) -> Any:
            self.rendering.allow(name, [*values[takes_context:], *named.values()], deep=name not in _SHALLOW)
            return self.rendering.made(function(*values, **named))

        return guarded


class Sandbox:
    """One template.

    Args:
        source: Its text.
        now: Date and time, as the template sees them.

    Raises:
        jinja2.TemplateSyntaxError: it is no template.
    """

    def __init__(self, source: str, now: Callable[[], datetime] = datetime.now) -> None:
        self._lock = threading.Lock()
        self._environment = _Environment(now)
        self._template = self._environment.from_string(source)

    def render(self, values: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the places in it that the template marked as the assistant's.

        Args:
            values: What the template sees: JSON's types alone.

        Raises:
            TooMuchError: it does more than it may.
            Exception: whatever else a template may do wrong.
        """
        with self._lock:
            rendering = self._environment.rendering = Rendering(values)
            parts = []
            for part in self._template.generate(**values):
                rendering.written += len(part)
                parts.append(part)
        return "".join(parts), rendering.marked
