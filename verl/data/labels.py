"""The labels of a classifier: their names, and how a model's config.json has them."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

Problem = Literal["one", "several", "number"]
PROBLEMS: tuple[Problem, ...] = get_args(Problem)
# As transformers calls them in `problem_type`.
NAMES_IN_CONFIG = {"one": "single_label_classification", "several": "multi_label_classification", "number": "regression"}


@dataclass(frozen=True)
class Labels:
    """The labels of a classifier.

    Attributes:
        names: name of each label, in the order of the model's outputs; of a number, one name that says nothing.
        problem: whether a row has "one" label or "several", or a "number" in place of a label.
    """

    names: tuple[str, ...]
    problem: Problem = "one"

    @property
    def shown(self) -> tuple[str, ...]:
        """Return the names for one line of a log: line ends and other characters that are not seen are escaped."""
        return tuple("".join(c if c.isprintable() else repr(c)[1:-1] for c in name) for name in self.names)

    def write(self, config: Any) -> None:
        """Write the labels into a model's config, as transformers reads them."""
        config.id2label = dict(enumerate(self.names))
        config.label2id = {name: number for number, name in enumerate(self.names)}
        config.problem_type = NAMES_IN_CONFIG[self.problem]


def labels_of(config: Any) -> Labels:
    """Return the labels that a model's config has. Without `problem_type`, each text has one of them."""
    problem = next((name for name, called in NAMES_IN_CONFIG.items() if called == config.problem_type), "one")
    return Labels(tuple(str(config.id2label[number]) for number in range(config.num_labels)), problem)  # type: ignore[arg-type]


def are_named(labels: Labels) -> bool:
    """Return whether the labels have names, rather than those that transformers gives to labels without."""
    return any(name != f"LABEL_{number}" for number, name in enumerate(labels.names))
