"""Grade-school word problems with worked answers, generated from a seed.

Each has one or two steps of addition and subtraction with two-digit numbers and results. A pair of numbers in a test problem
(`48 + 24`, `24 + 48`, `48 - 24`) does not occur in any training problem, so the model must calculate.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SMALLEST, LARGEST = 10, 99
# Fraction of all unordered pairs of two-digit numbers that is reserved for test problems.
TEST_SHARE = 0.08

Pair = tuple[int, int]


@dataclass(frozen=True)
class Step:
    """One calculation, `left operator right = result`."""

    left: int
    operator: str
    right: int

    @property
    def result(self) -> int:
        return self.left + self.right if self.operator == "+" else self.left - self.right

    @property
    def pair(self) -> Pair:
        """The two numbers, the smaller one first."""
        return min(self.left, self.right), max(self.left, self.right)

    def __str__(self) -> str:
        """Write the step as taught in school, tens first, then ones: a small model learns this several times faster."""
        tens, ones = self.right // 10 * 10, self.right % 10
        between = Step(self.left, self.operator, tens).result
        return f"{self.left}{self.operator}{tens}={between}, {between}{self.operator}{ones}={self.result}"


@dataclass(frozen=True)
class Problem:
    """A question and its worked answer, which ends in `#### N`."""

    question: str
    answer: str
    steps: tuple[Step, ...]

    @property
    def result(self) -> int:
        return self.steps[-1].result

    def row(self) -> dict[str, str]:
        return {"question": self.question, "answer": self.answer}


@dataclass(frozen=True)
class Template:
    """A template for problems.

    Attributes:
        operators: one operator per step, such as `+-`; the second step continues from the result of the first.
        question: text with the numbers {a}, {b}, {c}, in the order of the calculation.
        working: one sentence per step, with the calculations {1} and {2}.
        things: possible values of {things}.
    """

    operators: str
    question: str
    working: str
    things: tuple[str, ...] = ()


GIRLS = "Mia Emma Zoe Lily Anna Nora Ruth Sara Ella Ines Aisha Mei Priya Rosa Hana Clara Ivy Lena Maya Tara".split()
BOYS = "Ben Leo Sam Tom Noah Omar Raj Luis Kenji Paul Ivan Adam Finn Hugo Jack Karim Mark Nils Theo Will".split()
# Names with their pronouns {he} and {his}.
PEOPLE = [(name, "she", "her") for name in GIRLS] + [(name, "he", "his") for name in BOYS]
TOYS = ("marbles", "stickers", "shells", "stamps", "coins", "cards", "beads", "buttons", "badges", "pebbles", "postcards", "crayons")
FOOD = ("cookies", "muffins", "pies", "rolls", "pancakes", "cupcakes", "buns", "tarts", "waffles", "pretzels")
FRUIT = ("apples", "pears", "plums", "lemons", "oranges", "peaches", "melons", "cherries", "figs", "limes")
ANIMALS = ("cows", "sheep", "goats", "ducks", "geese", "hens", "horses", "rabbits")
PLANTS = ("roses", "tulips", "trees", "bushes", "beans", "carrots", "onions", "lilies")
GOODS = ("books", "lamps", "chairs", "bags", "hats", "shirts", "mugs", "kites", "scarves", "clocks")

TEMPLATES = (
    # One step.
    Template("+", "{name} has {a} {things}. {He} finds {b} more. How many {things} does {he} have now?", "{name} has {1} {things}.", TOYS),
    Template(
        "+",
        "{name} has {a} {things} and {other} has {b}. How many {things} do they have together?",
        "Together they have {1} {things}.",
        TOYS,
    ),
    Template(
        "+",
        "{name} baked {a} {things} in the morning and {b} in the afternoon. How many {things} did {he} bake?",
        "{He} baked {1} {things}.",
        FOOD,
    ),
    Template(
        "+",
        "A farm has {a} {things} in the barn and {b} in the field. How many {things} are on the farm?",
        "There are {1} {things}.",
        ANIMALS,
    ),
    Template(
        "+",
        "{other} picked {a} {things}. {name} picked {b} more than {other}. How many {things} did {name} pick?",
        "{name} picked {1} {things}.",
        FRUIT,
    ),
    Template("+", "{name} read {a} pages on Monday and {b} pages on Tuesday. How many pages is that in all?", "{name} read {1} pages."),
    Template("+", "{name} paid {a} dollars for a coat and {b} dollars for shoes. How much did {he} spend?", "{He} spent {1} dollars."),
    Template(
        "+",
        "There are {a} {things} in the garden. {name} plants {b} more. How many {things} are there now?",
        "There are {1} {things}.",
        PLANTS,
    ),
    Template(
        "+", "A train has {a} people on it. At the station {b} people get on. How many people are on the train?", "There are {1} people."
    ),
    Template(
        "-",
        "{name} had {a} {things}. {He} gave {b} of them to {other}. How many {things} does {he} have left?",
        "{name} has {1} {things}.",
        TOYS,
    ),
    Template("-", "{name} baked {a} {things}. {His} friends ate {b}. How many {things} are left?", "There are {1} {things}.", FOOD),
    Template("-", "A shop had {a} {things} and sold {b}. How many {things} are still in the shop?", "There are {1} {things}.", GOODS),
    Template(
        "-", "{name} has {a} {things}. {other} has {b} fewer. How many {things} does {other} have?", "{other} has {1} {things}.", TOYS
    ),
    Template("-", "A book has {a} pages. {name} has read {b} of them. How many pages must {he} still read?", "{He} must read {1} pages."),
    Template("-", "{name} had {a} dollars and bought a game for {b} dollars. How much money is left?", "{He} has {1} dollars."),
    Template(
        "-", "{name} picked {a} {things} and {other} picked {b}. How many more did {name} pick?", "{name} picked {1} more {things}.", FRUIT
    ),
    Template("-", "There were {a} {things} on a hill, and {b} ran away. How many {things} stayed?", "There are {1} {things}.", ANIMALS),
    Template("-", "A ribbon is {a} inches long. {name} cuts off {b} inches. How long is it now?", "It is {1} inches long."),
    # Two steps.
    Template(
        "++",
        "{name} has {a} {things}. {He} gets {b} from {other} and finds {c} more. How many {things} does {he} have?",
        "With the gift {he} has {1}. In all {he} has {2} {things}.",
        TOYS,
    ),
    Template(
        "++",
        "{name} ran for {a} minutes on Monday, {b} on Tuesday and {c} on Friday. How many minutes did {he} run?",
        "In two days {he} ran {1}. In all {he} ran {2} minutes.",
    ),
    Template(
        "++",
        "A farm has {a} cows, {b} goats and {c} hens. How many animals is that?",
        "Cows and goats make {1}. With hens it is {2} animals.",
    ),
    Template(
        "+-",
        "{name} had {a} {things} and bought {b} more. Then {he} lost {c}. How many {things} are left?",
        "First {he} had {1}. Then {he} had {2} {things}.",
        TOYS,
    ),
    Template(
        "+-",
        "{name} baked {a} {things} and {other} baked {b}. They sold {c} at school. How many {things} are left?",
        "Together they had {1}. They have {2} {things}.",
        FOOD,
    ),
    Template(
        "+-",
        "{name} saved {a} dollars in May and {b} dollars in June. {He} spent {c} dollars. How much is left?",
        "{He} saved {1}. {He} has {2} dollars.",
    ),
    Template(
        "+-",
        "A bus had {a} people. At a stop {b} got on and {c} got off. How many people are on the bus?",
        "After some got on there were {1}. Then there were {2} people.",
    ),
    Template(
        "-+",
        "A shop had {a} {things}. It sold {b} and then got {c} new ones. How many {things} are there now?",
        "After the sale there were {1}. Now there are {2} {things}.",
        GOODS,
    ),
    Template(
        "-+",
        "{name} had {a} {things}. {He} gave {b} to {other} and later won {c}. How many {things} does {he} have?",
        "After the gift {he} had {1}. Now {he} has {2} {things}.",
        TOYS,
    ),
    Template(
        "-+",
        "{other} picked {a} {things}. {name} picked {b} fewer, then {c} more. How many {things} did {name} pick?",
        "At first {name} picked {1}. In all {he} picked {2} {things}.",
        FRUIT,
    ),
    Template(
        "--",
        "{name} picked {a} {things}. {He} ate {b} and gave {c} to {other}. How many {things} are left?",
        "After eating {he} had {1}. Now {he} has {2} {things}.",
        FRUIT,
    ),
    Template(
        "--",
        "There were {a} {things} in a shop. On Monday {b} were sold, on Friday {c}. How many {things} are left?",
        "After Monday there were {1}. Now there are {2} {things}.",
        GOODS,
    ),
    Template(
        "--",
        "{name} had {a} dollars. {He} paid {b} dollars for a bag and {c} dollars for lunch. How much is left?",
        "After the bag {he} had {1}. Now {he} has {2} dollars.",
    ),
)


def write_problems(path_train: Path, path_test: Path, n_train: int, n_test: int, seed: int = 1) -> tuple[list[Problem], list[Problem]]:
    """Write two JSONL files with the columns `question` and `answer`.

    Args:
        path_train: file for the training rows, in an existing folder.
        path_test: file for the test rows, which share no pair of numbers with the training rows.
        n_train: number of training rows.
        n_test: number of test rows.
        seed: equal seeds give equal files.
    Returns:
        the problems of both files, in order.
    """
    train, test = make_problems(n_train, n_test, seed)
    for path, problems in ((path_train, train), (path_test, test)):
        path.write_text("".join(json.dumps(problem.row()) + "\n" for problem in problems), encoding="utf-8")
    return train, test


def tool_chat(problem: Problem) -> list[dict[str, str]]:
    """Write a problem as a chat in which a calculator (verl/tools/calculator.py) computes each step."""
    chat = [{"role": "user", "content": problem.question}]
    for step in problem.steps:
        order = f"calculate {step.left}{step.operator}{step.right}"
        chat += [{"role": "assistant", "content": order}, {"role": "tool", "content": str(step.result)}]
    return [*chat, {"role": "assistant", "content": f"#### {problem.result}"}]


def make_problems(n_train: int, n_test: int, seed: int = 1) -> tuple[list[Problem], list[Problem]]:
    """Generate training and test problems without duplicates and without a common pair of numbers."""
    draw = random.Random(seed)
    train_pairs, test_pairs = _split_pairs(draw)
    test = _distinct(n_test, test_pairs, draw)
    train = _distinct(n_train, train_pairs, draw)
    return train, test


def _split_pairs(draw: random.Random) -> tuple[set[Pair], set[Pair]]:
    pairs = [(small, large) for small in range(SMALLEST, LARGEST + 1) for large in range(small, LARGEST + 1)]
    draw.shuffle(pairs)
    n_test = round(len(pairs) * TEST_SHARE)
    return set(pairs[n_test:]), set(pairs[:n_test])


def _distinct(count: int, pairs: set[Pair], draw: random.Random) -> list[Problem]:
    problems: dict[str, Problem] = {}
    for problem in _endless(pairs, draw):
        if len(problems) == count:
            break
        problems.setdefault(problem.question, problem)
    return list(problems.values())


def _endless(pairs: set[Pair], draw: random.Random) -> Iterator[Problem]:
    one_step = [template for template in TEMPLATES if len(template.operators) == 1]
    two_steps = [template for template in TEMPLATES if len(template.operators) == 2]
    while True:
        template = draw.choice(draw.choice((one_step, two_steps)))
        yield _tell(template, _calculate(template.operators, pairs, draw), draw)


def _calculate(operators: str, pairs: set[Pair], draw: random.Random) -> tuple[Step, ...]:
    """Draw steps with two-digit numbers and results, whose pairs are all in `pairs`."""
    while True:
        left = draw.randint(SMALLEST, LARGEST)
        steps: list[Step] = []
        for operator in operators:
            step = Step(left, operator, draw.randint(SMALLEST, LARGEST))
            if not SMALLEST <= step.result <= LARGEST or step.pair not in pairs:
                break
            steps.append(step)
            left = step.result
        if len(steps) == len(operators):
            return tuple(steps)


def _tell(template: Template, steps: Sequence[Step], draw: random.Random) -> Problem:
    """Fill names, things and numbers into a template."""
    (name, he, his), (other, *_) = draw.sample(PEOPLE, 2)
    numbers = [steps[0].left, *(step.right for step in steps)]
    words: dict[str, object] = dict(zip("abc", numbers, strict=False))
    words |= {"name": name, "he": he, "his": his, "He": he.capitalize(), "His": his.capitalize(), "other": other}
    words["things"] = draw.choice(template.things) if template.things else ""
    question = template.question.format(**words)
    working = template.working.format("", *steps, **words).replace(". ", ".\n")
    return Problem(question, f"{working}\n#### {steps[-1].result}", tuple(steps))
