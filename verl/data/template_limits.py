"""Limits of chat templates, which are programs of a model's author: iterations, and sizes of texts and numbers.

The sandbox of Jinja keeps a template from files and from Python's objects, but not from `{% for %}` in `{% for %}`, `'a' * 10**10` or
texts that double themselves. A template that exceeds a limit raises an error, as one that is wrong does.
"""

import re
import threading
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeVisitor
from transformers.utils import chat_template_utils

MOST_STEPS = 2_000_000  # iterations of loops and calls in one rendering
MOST_CHARACTERS = 2**27  # made in one rendering by operators and calls
LARGEST_NUMBER = 10**6  # as an argument, or as a factor of a text or list
MOST_ITEMS = 10**6  # of one list or object, with those inside it
WIDTH = re.compile(r"\d{6}")  # in a format such as `%1000000d`


class _Used(threading.local):
    """What the rendering of this thread has used."""

    steps = 0
    characters = 0


_used = _Used()


def limit() -> None:
    """Have transformers compile every chat template of this process with limits."""
    if chat_template_utils.ImmutableSandboxedEnvironment is not LimitedEnvironment:
        chat_template_utils.ImmutableSandboxedEnvironment = LimitedEnvironment  # type: ignore[misc]
        chat_template_utils._compile_jinja_template.cache_clear()


class _LimitedTemplate(Template):
    """A template whose renderings begin with nothing used."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        _used.steps = _used.characters = 0
        return super().render(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        _used.steps = _used.characters = 0
        return super().generate(*args, **kwargs)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with limits."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    template_class = _LimitedTemplate

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.globals |= {"_step": step, "_measured": measured}
        self.filters |= {name: _limited(self.filters[name]) for name in ("center", "indent", "format", "join", "replace", "wordwrap")}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.body.insert(0, nodes.ExprStmt(nodes.Call(nodes.Name("_step", "load"), [], [], None, None)).set_lineno(loop.lineno))
        for macro in tree.find_all(nodes.Macro):
            macro.body.insert(0, nodes.ExprStmt(nodes.Call(nodes.Name("_step", "load"), [], [], None, None)).set_lineno(macro.lineno))
        whole: nodes.Template = _Measured().visit(tree)
        whole.set_environment(self)
        return whole

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right` within the limits."""
        if operator == "+":
            return measured(left + right)
        if operator == "**":
            _check_number(right, 1000)
            _check_number(left, LARGEST_NUMBER)
        if operator == "*":
            _check_product(left, right)
        if operator == "%" and isinstance(left, str):
            _check_format(left, right)
        return measured(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Any:
        """Return the sandbox's `str.format` of a text, within the limits; None if the value is another function."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def within_limits(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, *args, *kwargs.values())
            return str(wrapped(*args, **kwargs))

        return within_limits

    def call(self, context: Any, called: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method within the limits."""
        if called in (step, measured):
            return called(*args)
        step()
        for one in (*args, *kwargs.values()):
            _check_number(one, LARGEST_NUMBER)
        text = getattr(called, "__self__", None)
        if isinstance(text, str) and getattr(called, "__name__", "") == "replace" and len(args) >= 2:
            _check_replacement(text, *args[:2])
        return measured(super().call(context, called, *args, **kwargs))


class _Measured(NodeVisitor):
    """Wraps each expression that makes a text or a container, or is printed, into a call of `measured`."""

    def visit(self, node: Any, *args: Any, **kwargs: Any) -> Any:
        for name, value in node.iter_fields():
            if isinstance(value, list):
                setattr(node, name, [self.visit(one) if isinstance(one, nodes.Node) else one for one in value])
            elif isinstance(value, nodes.Node):
                setattr(node, name, self.visit(value))
        if isinstance(node, nodes.Output):
            node.nodes = [
                one if isinstance(one, (nodes.TemplateData, nodes.Const, nodes.Add, nodes.Call)) else _wrapped(one) for one in node.nodes
            ]
        is_made = isinstance(node, (nodes.Concat, nodes.List, nodes.Dict)) or (isinstance(node, nodes.Tuple) and node.ctx == "load")
        return _wrapped(node) if is_made and any(node.find_all((nodes.Name, nodes.Call))) else node


def _wrapped(node: Any) -> Any:
    return nodes.Call(nodes.Name("_measured", "load"), [node], [], None, None).set_lineno(node.lineno)


def step() -> str:
    """Count an iteration or a call. Raises SecurityError: there are too many."""
    _used.steps += 1
    if _used.steps > MOST_STEPS:
        raise SecurityError(f"it takes more than {MOST_STEPS:,} steps")
    return ""


def measured(value: Any) -> Any:
    """Count the characters of a text that has been made, or the items of a container. Raises SecurityError: there are too many."""
    if type(value) is str and len(value) <= MOST_CHARACTERS - _used.characters:  # nearly always
        _used.characters += len(value)
        return value
    if isinstance(value, (list, tuple, dict)):
        _count_items(value, 0)
    if isinstance(value, (str, list, tuple)):
        _used.characters += len(value)
        if _used.characters > MOST_CHARACTERS:
            raise SecurityError(f"it makes more than {MOST_CHARACTERS:,} characters")
    return value


def _count_items(value: Any, before: int) -> int:
    """Return `before` plus the items of a container and those inside it, each as often as it would be printed."""
    for item in value.values() if isinstance(value, dict) else value:
        before += 1
        if isinstance(item, (list, tuple, dict)):
            before = _count_items(item, before)
        if before > MOST_ITEMS:
            raise SecurityError(f"it makes a value of more than {MOST_ITEMS:,} items")
    return before


def _limited(function: Any) -> Any:
    def limited(*args: Any, **kwargs: Any) -> Any:
        for one in (*args, *kwargs.values()):
            _check_number(one, LARGEST_NUMBER)
        texts = [one for one in args if isinstance(one, str)]
        if function.__name__ == "do_format":
            _check_format(texts[0] if texts else "", *args)
        if function.__name__ == "do_replace" and len(texts) >= 3:
            _check_replacement(*texts[:3])
        return measured(function(*args, **kwargs))

    limited.__dict__.update(function.__dict__)  # what Jinja passes to it
    limited.__name__ = function.__name__
    return limited


def _check_number(value: Any, largest: int) -> None:
    if isinstance(value, int) and abs(value) > largest:
        raise SecurityError(f"it computes with a number above {largest:,}")


def _check_product(left: Any, right: Any) -> None:
    for sequence, factor in ((left, right), (right, left)):
        if isinstance(sequence, (str, list, tuple)) and isinstance(factor, int) and len(sequence) * factor > MOST_CHARACTERS:
            raise SecurityError(f"it makes more than {MOST_CHARACTERS:,} characters")
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > 4096:
        raise SecurityError("it computes with numbers of more than a thousand digits")


def _check_format(text: str, *values: Any) -> None:
    """Raise SecurityError for a width above LARGEST_NUMBER, in the text or, by `*` or `{}`, among the values."""
    is_wide = any(isinstance(one, int) and abs(one) > LARGEST_NUMBER for one in _flat(values))
    if WIDTH.search(text) or (is_wide and ("*" in text or "{" in text)):
        raise SecurityError("it has a format that is too wide")


def _flat(values: tuple[Any, ...]) -> list[Any]:
    return [one for value in values for one in (value if isinstance(value, tuple) else [value])]


def _check_replacement(text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str) and text.count(old) * len(new) > MOST_CHARACTERS:
        raise SecurityError(f"it makes more than {MOST_CHARACTERS:,} characters")
