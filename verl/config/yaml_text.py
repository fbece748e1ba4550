"""YAML as configs have it: what is true, a number and a text, and how large a file may be."""

import re
from typing import Any

import yaml

NUMBER = re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$")
MOST_VALUES = 100_000  # in one config file
DEEPEST = 100  # lists and mappings in brackets, inside one another; PyYAML takes a second to look at a thousand
TOO_DEEP = "nested too deep"


class OldBoolean(str):
    """A word that only YAML 1.1 reads as a boolean, without quotes: yes, no, on, off. A key that holds text takes it as text."""


class Loader(yaml.SafeLoader):
    """YAML for configs: a duplicate key is an error, keys are text, 1e-5 is a number, and only true and false are booleans."""

    @classmethod
    def read(cls, text: str) -> Any:
        """Return the value of a document.

        Raises:
            yaml.YAMLError: it is not YAML, or too deep or too large to be a config.
        """
        try:
            loader = cls(text)
            node = loader.get_single_node()
            _check_size(node)
            return None if node is None else loader.construct_document(node)
        except yaml.YAMLError:
            raise
        except RecursionError:
            raise yaml.YAMLError(TOO_DEEP) from None
        except (ValueError, TypeError, OverflowError, ArithmeticError, LookupError, AttributeError) as error:  # of a value with a tag
            raise yaml.YAMLError(f"a value cannot be read: {error}") from None

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level >= DEEPEST:
            raise yaml.YAMLError(TOO_DEEP)
        super().fetch_flow_collection_start(TokenClass)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a text, not a list or a mapping", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is given twice, first on line {seen[key.value]}", key.start_mark
                )
            seen[key.value] = key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


def _check_size(node: yaml.Node | None) -> None:
    """Refuse a tree that contains itself, and one that its aliases make larger than MOST_VALUES; both are short to write."""
    sizes: dict[int, int | None] = {}  # None: being counted

    def size(one: yaml.Node) -> int:
        if id(one) in sizes:
            known = sizes[id(one)]
            if known is None:
                raise yaml.constructor.ConstructorError(None, None, "a value that contains itself", one.start_mark)
            return known
        sizes[id(one)] = None
        parts = one.value if isinstance(one, yaml.SequenceNode) else [part for pair in one.value for part in pair]
        sizes[id(one)] = found = 1 + sum(size(part) if isinstance(part, yaml.CollectionNode) else 1 for part in parts)
        if found > MOST_VALUES:
            raise yaml.constructor.ConstructorError(None, None, f"more than {MOST_VALUES:,} values", one.start_mark)
        return found

    if isinstance(node, yaml.CollectionNode):
        size(node)


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    """Read a whole number as decimal: YAML 1.1 would read 010 as 8, and 1:30 as 90."""
    return int(str(node.value).replace("_", ""))


# Of PyYAML's table of plain words, only null and merges are kept: dates and YAML 1.1's numbers and booleans are names more often.
_KEPT = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge", "tag:yaml.org,2002:value")
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag in _KEPT] for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
Loader.add_implicit_resolver("!old_boolean", re.compile(r"^(?:yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF)$"), list("yYnNoO"))
Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+0123456789."))
Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
Loader.add_constructor("!old_boolean", lambda loader, node: OldBoolean(node.value))


class TextLoader(Loader):
    """The same YAML with every scalar as the text that was written; only an explicit tag, such as `!!null`, gives it another type."""

    yaml_implicit_resolvers = {"<": Loader.yaml_implicit_resolvers["<"]}  # noqa: RUF012 - the merge of mappings, `<<: *name`
