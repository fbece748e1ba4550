"""What was found, in words: lines of a label and a text, and groups of findings. The terminal and the page show the same."""

from dataclasses import dataclass

from verl.inspection.result import DataSet, Finding, Inspection, Lengths, Steps

Fact = tuple[str, str]  # label and text
KINDS = {
    "trained": "trained text",
    "stop": "stop token, trained",
    "masked": "masked text",
    "control": "control token, masked",
    "spelled": "the name of a control token, as plain text",
}


@dataclass(frozen=True)
class Group:
    """Findings of one kind.

    Attributes:
        title: what was looked for.
        nothing: what is said if there are none.
        is_bad: whether they stop a trainer.
    """

    title: str
    findings: list[Finding]
    nothing: str = "none"
    is_bad: bool = False


def count(number: int, unit: str) -> str:
    """Return a number with its unit in the plural, such as "rows", or in the singular."""
    return f"{number:,} {unit[:-1] if number == 1 else unit}"


def printable(text: str) -> str:
    """Return a text in which control characters, and those that are not seen or change its direction, are escaped.

    A terminal and a browser obey some of them. Line ends and tabs stay.
    """
    return text if text.isascii() and text.isprintable() else "".join(map(_printable, text))


def _printable(one: str) -> str:
    return (
        one
        if one in "\n\t" or one.isprintable() or (one.isspace() and one not in "\r\v\f\u2028\u2029\x85\x1c\x1d\x1e\x1f")
        else ascii(one)[1:-1]
    )


def verdict(found: Inspection) -> tuple[bool, str]:
    """Return whether the run could begin, and what it would train, in one line."""
    invalid = [(data, one) for data in found.sets for one in data.invalid]
    command = f"verl {found.command}"
    if invalid:
        (data, first), many = invalid[0], sum(one.rows for _, one in invalid)
        place = first.places[0] if first.places else data.key
        return False, f"{command} would stop: {count(many, data.unit)} invalid, the first {place}: {first.what}"
    if not found.train.used:
        return False, f"{command} would stop: no row is left"
    data = found.train
    verb, left = "ask" if data.unit == "prompts" else "train on", sum(one.rows for one in data.dropped)
    used = f"{data.used:,} of the {count(data.tokenized, data.unit)} of a sample" if data.is_sample else count(data.used, data.unit)
    return True, f"{command} would {verb} {used}{f', and leave out {left:,}' if left else ''}"


def of_run(found: Inspection) -> list[Fact]:
    return [
        ("read as", f"data of verl {found.command}"),
        ("model", found.model),
        ("chat template", found.template),
        ("stop tokens", ", ".join(found.stop_tokens) or "none"),
    ]


def of_set(data: DataSet) -> list[Fact]:
    """Return what is to be said about a set of rows."""
    facts = [("files", "; ".join(f"{file.name} ({count(file.rows, 'rows')})" for file in data.files))]
    facts += [("recognised", line) for line in data.recognised]
    invalid, dropped = sum(one.rows for one in data.invalid), sum(one.rows for one in data.dropped)
    facts.append(("rows", f"{data.rows:,} read and checked, {invalid:,} invalid"))
    among = "all valid rows"
    if data.is_sample:
        among = f"a sample of {count(data.tokenized, 'rows')}, one in {data.one_in:,} (--all: all)"
    facts.append(("tokenized", f"{among}: {data.used:,} used, {data.cut:,} cut, {dropped:,} dropped"))
    share = f", {data.trained_share:.1%} trained" if data.unit != "prompts" else ""
    of_sample = " in the sample" if data.is_sample else ""
    facts.append(("tokens", f"{data.tokens:,}{of_sample}{share}"))
    if data.lengths is not None:
        facts.append(("length", _lengths(data.lengths)))
    if data.trained is not None:
        facts.append(("trained", _lengths(data.trained)))
    return facts


def _lengths(lengths: Lengths) -> str:
    low, half, most, nearly, high = (lengths.quantiles[key] for key in ("0", "50", "90", "99", "100"))
    return f"{low:,} to {high:,} tokens, {lengths.mean:,.0f} on average; half have at most {half:,}, 90% {most:,}, 99% {nearly:,}"


def of_steps(steps: Steps, command: str) -> list[Fact]:
    facts = [
        ("steps", f"{steps.total:,} ({steps.per_epoch:,} an epoch), {steps.text}" if command == "ppo" else _steps(steps)),
        ("tokens", f"{steps.tokens_per_epoch:,} an epoch" + (" of prompts" if command == "ppo" else "")),
    ]
    if steps.fill is not None:
        how = "packed" if steps.packed else "padded"
        facts.append(("fill", f"{steps.fill:.1%} of the room of {how} micro-batches, in {steps.micro_batches:,} of them"))
    return facts


def _steps(steps: Steps) -> str:
    return f"{steps.total:,} ({steps.per_epoch:,} an epoch) {steps.text}, on one GPU"


def groups_of(data: DataSet) -> list[Group]:
    compared = (
        f" (near copies among {data.compared:,} of {count(data.rows, 'rows')})" if data.compared < data.rows - len(data.invalid) else ""
    )
    return [
        Group("invalid rows, which stop the run", data.invalid, is_bad=True),
        Group("rows that are left out", data.dropped),
        Group(f"copies{compared}", data.copies),
        Group("control tokens spelled out in the text", data.control),
        Group("rare or broken characters", data.characters),
    ]


def overlap_of(found: Inspection) -> Group:
    return Group("validation rows that repeat training rows", found.overlap)


def of_finding(finding: Finding, unit: str) -> str:
    """Return a finding as one line, without its example and fix."""
    more = ", …" if finding.rows > len(finding.places) else ""
    return f"{finding.what}: {count(finding.rows, unit)} ({', '.join(finding.places)}{more})"
