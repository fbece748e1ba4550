"""What `verl inspect` found: the same for the terminal, the page, JSON and the Python API."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

PLACES = 5  # locations that a finding names


@dataclass
class Finding:
    """Something that several rows have in common.

    Attributes:
        what: what they have in common, such as "control characters".
        rows: number of these rows.
        places: location of the first ones, such as `train.jsonl:17`.
        example: text of the first one, abbreviated.
        fix: what helps; empty if nothing need be done.
    """

    what: str
    rows: int = 0
    places: list[str] = field(default_factory=list)
    example: str = ""
    fix: str = ""

    def add(self, rows: int, places: Iterable[str], example: str = "") -> None:
        self.rows += rows
        self.places += list(places)[: PLACES - len(self.places)]
        self.example = self.example or example


@dataclass(frozen=True)
class Bin:
    """Documents of `first` to `last` tokens."""

    first: int
    last: int
    documents: int


@dataclass(frozen=True)
class Lengths:
    """Lengths of documents, in tokens.

    Attributes:
        mean: the average.
        quantiles: length that this percentage of the documents does not exceed, by "0", "50", "90", "99" and "100".
        bins: a histogram without gaps.
    """

    documents: int
    mean: float
    quantiles: dict[str, int]
    bins: list[Bin]


@dataclass(frozen=True)
class File:
    """An entry of the list of files, and the number of rows read from it."""

    name: str
    rows: int


@dataclass
class DataSet:
    """The rows of `data.train_files` or `data.val_files`.

    Attributes:
        key: the config key.
        unit: what a row is called: "rows", "pairs" or "prompts".
        files: the files, in order.
        rows: number of rows that were read and checked.
        tokenized: number of valid rows that were tokenized. Fewer than all: a sample, one row in `one_in`.
        used, cut: of the tokenized rows, those that are trained or asked, and those of them that are longer than the limit.
        tokens, trained_tokens: of the used rows.
        recognised: how the rows were read, one line each.
        invalid: rows that stop a trainer, by reason.
        dropped: rows that a trainer leaves out, by reason.
        lengths, trained: lengths of the used documents, and of what is trained of each; None if there is none.
        copies: rows that are equal, or nearly, to others.
        compared: rows that were compared for near copies.
        control: names of control tokens that are spelled out in the text.
        characters: rare or broken characters.
    """

    key: str
    unit: str
    files: list[File] = field(default_factory=list)
    rows: int = 0
    tokenized: int = 0
    one_in: int = 1
    used: int = 0
    cut: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    recognised: list[str] = field(default_factory=list)
    invalid: list[Finding] = field(default_factory=list)
    dropped: list[Finding] = field(default_factory=list)
    lengths: Lengths | None = None
    trained: Lengths | None = None
    copies: list[Finding] = field(default_factory=list)
    compared: int = 0
    control: list[Finding] = field(default_factory=list)
    characters: list[Finding] = field(default_factory=list)

    @property
    def is_sample(self) -> bool:
        return self.one_in > 1

    @property
    def trained_share(self) -> float:
        """Trained tokens, as a fraction of all tokens of the used rows."""
        return self.trained_tokens / max(1, self.tokens)


@dataclass(frozen=True)
class Steps:
    """The steps of a run on one GPU.

    Attributes:
        total, per_epoch: number of steps.
        rows_per_step: rows of a full step.
        text: the steps in words.
        tokens_per_epoch: tokens of an epoch; estimated if the rows are a sample.
        fill: fraction of the micro-batches' tokens that belong to rows, if `micro_batches` were made; None for prompts.
        packed: whether documents are packed; otherwise they are padded.
        micro_batches: number of micro-batches that `fill` was measured with.
    """

    total: int
    per_epoch: int
    rows_per_step: int
    text: str
    tokens_per_epoch: int
    fill: float | None = None
    packed: bool = True
    micro_batches: int = 0


@dataclass(frozen=True)
class Part:
    """A part of a document.

    Attributes:
        kind: "trained"; "stop", a trained control token; "masked"; "control", a control token that is not trained; "spelled", the name of a
            control token that is plain text; or "left out", a note in place of the middle of a long document.
        text: the decoded tokens.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class Shown:
    """A document as the model sees it.

    Attributes:
        name: "row", "chosen", "rejected" or "prompt".
        tokens, trained: number of its tokens, and of those that are trained, as it is cut.
    """

    name: str
    tokens: int
    trained: int
    parts: list[Part]


@dataclass(frozen=True)
class ShownRow:
    """A row that was asked for.

    Attributes:
        number: number of the row, from 1, over all files.
        place: its location.
        why: why it is shown, such as "longest".
        documents: its documents; empty if it is invalid.
        note: why it is not used, if so.
        columns: of a prompt, the columns that rewards get, as text.
    """

    number: int
    place: str
    why: str
    documents: list[Shown]
    note: str = ""
    columns: dict[str, str] = field(default_factory=dict)


@dataclass
class Inspection:
    """What a trainer would make of its data.

    Attributes:
        command: the trainer: "sft", "reward" or "ppo".
        model: model.partial_pretrain.
        template: the chat template, in words.
        stop_tokens: tokens that end an answer.
        train, validation: the rows; validation is None without data.val_files.
        overlap: validation rows that are training rows too, or nearly.
        steps: None if no row is used.
        rows: the rows that were asked for; `missing`: numbers and places that were asked for, but are not there.
        found: number of rows with the text that was asked for; None if none was.
        seconds: time that the inspection took.
    """

    command: str
    model: str
    template: str
    stop_tokens: list[str]
    train: DataSet
    validation: DataSet | None = None
    overlap: list[Finding] = field(default_factory=list)
    steps: Steps | None = None
    rows: list[ShownRow] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    found: int | None = None
    seconds: float = 0.0

    @property
    def sets(self) -> list[DataSet]:
        return [self.train] if self.validation is None else [self.train, self.validation]

    def as_json(self) -> dict[str, Any]:
        """Return everything as nested dicts and lists that `json.dumps` writes."""
        return asdict(self)
