"""The model card, README.md: how a model was made, in Markdown, and as the YAML that the Hugging Face Hub reads.

Nothing secret is in it: settings are redacted, and of a path only the last part is shown.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from verl import regular_file
from verl.models.foreign import ADAPTER_CONFIG
from verl.models.prompt_format import FILE as PROMPT_FORMAT
from verl.models.provenance import Provenance, Scores, Stage, card_file_of
from verl.pace import counted
from verl.redaction import redact, redact_text

FILE = "README.md"
MARK = "<!-- Written by verl export. Without this line, it is not replaced. -->"
LICENCE_KEYS = ("license", "license_name", "license_link", "language")
METHODS = {
    "sft": "supervised fine-tuning",
    "bradley_terry": "training as a reward model",
    "classify": "training as a classifier",
    "dpo": "direct preference optimization",
}
UNKNOWN = "unknown"  # the Hub's own word for a licence, too
LONGEST_VALUE = 200  # characters of a setting


@dataclass(frozen=True)
class Facts:
    """What a card tells besides how the model was made.

    Attributes:
        title: heading of the card.
        is_adapter: whether it is an adapter, which needs its base model.
        has_template: whether the tokenizer has a chat template.
        stop_tokens: the tokens that end an answer, as text.
        base_metadata: what the base model's card says: license, license_name, license_link, language.
    """

    title: str
    is_adapter: bool
    has_template: bool
    stop_tokens: list[str]
    base_metadata: dict[str, Any]


def facts_of(folder: Path, title: str, base_metadata: dict[str, Any]) -> Facts:
    """Read from a directory what a card tells of its files."""
    template = (folder / "chat_template.jinja").is_file() or bool(_json_of(folder / "tokenizer_config.json").get("chat_template"))
    ids = _json_of(folder / PROMPT_FORMAT).get("stop_ids") or _json_of(folder / "generation_config.json").get("eos_token_id") or []
    added = _json_of(folder / "tokenizer.json").get("added_tokens") or []
    names = {one.get("id"): str(one.get("content")) for one in added if isinstance(one, dict)}
    stop = [names.get(one, f"token {one}") for one in (ids if isinstance(ids, list) else [ids])]
    return Facts(title, (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file(), template, stop, base_metadata)


def _json_of(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(regular_file.read(path, follow=True))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def metadata_of(model: str) -> dict[str, Any]:
    """Return licence and language that the card of a model says; empty where it has none, or is not here."""
    file = card_file_of(model)
    if file is None:
        return {}
    try:
        text = regular_file.read(file, follow=True).decode("utf-8")
        data = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {key: data[key] for key in LICENCE_KEYS if data.get(key)}


def write_card(made: Provenance, facts: Facts) -> str:
    """Return the text of the model card.

    Raises:
        ValueError: the YAML at its top is not what the Hub reads, which would be an error of this module.
    """
    parts = [_summary(made, facts), _use(made, facts), _data(made), _training(made), _scores(made), _format(facts), _limits(made, facts)]
    body = "\n\n".join(part for part in parts if part)
    card = ModelCard(f"---\n{_metadata(made, facts).to_yaml()}\n---\n\n{MARK}\n\n# {_plain(facts.title)}\n\n{body}\n")
    text = str(card)
    if ModelCard(text).data.to_dict() != _metadata(made, facts).to_dict():
        raise ValueError("the metadata of the model card is not read as it was written")
    return text


def is_ours(text: str) -> bool:
    return MARK in text


def _metadata(made: Provenance, facts: Facts) -> ModelCardData:
    known = {key: value for key, value in facts.base_metadata.items() if key in LICENCE_KEYS}
    hub_files = [path for stage in made.stages for path in map(_path_of, stage.files) if _is_on_hub(path)]
    results = [result for scores in made.scores if scores.of == "this model" for result in _eval_results(scores)]
    return ModelCardData(
        **{"license": UNKNOWN, **known},
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=made.hub_base,
        datasets=list(dict.fromkeys(path.partition(":")[0] for path in hub_files)) or None,
        tags=list(dict.fromkeys(["verl", *filter(None, (stage.method for stage in made.stages)), *_lora(made, facts)])),
        model_name=_plain(facts.title) if results else None,
        eval_results=results or None,
    )


def _lora(made: Provenance, facts: Facts) -> list[str]:
    return ["lora"] if facts.is_adapter or any(stage.settings.get("model.lora_rank") for stage in made.stages) else []


def _eval_results(scores: Scores) -> Iterator[EvalResult]:
    config = scores.results.get("config", {})
    name = _shown_file(config.get("test_file"))
    yield EvalResult(
        task_type="text-generation",
        dataset_type=name.partition(":")[0].strip("./") or "file",
        dataset_name=name,
        metric_type="exact_match" if scores.results.get("confidence_interval_95") else "score",
        metric_value=round(float(scores.results["exact_match"]), 6),
        metric_name=_metric(scores),
    )


def _summary(made: Provenance, facts: Facts) -> str:
    what = "This is a LoRA adapter" if facts.is_adapter else "This is a language model"
    base = f" of {_model(made)}" if facts.is_adapter else f" that was trained from {_model(made)}" if made.base else ""
    how = ", then ".join(METHODS.get(stage.method, stage.method) for stage in reversed(made.stages) if stage.method)
    return f"{what}{base}{f' by {how}' if how else ''}, with [verl](#training)." if made.stages else f"{what}{base}."


def _model(made: Provenance) -> str:
    if made.hub_base:
        return f"[{made.hub_base}](https://huggingface.co/{made.hub_base})"
    return f"{code(_shown_file(made.base))} (a local directory)" if made.base else "a base model that is not known"


def _use(made: Provenance, facts: Facts) -> str:
    if facts.is_adapter:
        base = made.hub_base or "BASE_MODEL"
        load = f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}", dtype="auto"), path)'
        imports = "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer"
    else:
        load = 'model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")'
        imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if facts.has_template:
        ask = (
            'chat = [{"role": "user", "content": "…"}]\n'
            'prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")'
        )
    else:
        ask = 'prompt = tokenizer("…", return_tensors="pt")'
    end = 'answer = model.generate(**prompt, max_new_tokens=512)\nprint(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :]))'
    lines = [imports, "", 'path = "…"  # this repository or directory', "tokenizer = AutoTokenizer.from_pretrained(path)", load, ask, end]
    return "## Use\n\n```python\n{}\n```".format("\n".join(lines))


def _data(made: Provenance) -> str:
    if not made.stages:
        return "## Data\n\nWhat it was trained on is not known."
    lines = [_files_of(stage) for stage in reversed(made.stages)]
    return "## Data\n\n| run | files | rows | tokens seen |\n|---|---|---|---|\n" + "\n".join(lines)


def _files_of(stage: Stage) -> str:
    files = ", ".join(_file(one) for one in stage.files) or UNKNOWN
    return row(_run(stage), files, _count(stage.rows), _count(stage.tokens))


def _file(given: Any) -> str:
    share = "".join(f", {key} {given[key]}" for key in ("weight", "rows") if key in given) if isinstance(given, dict) else ""
    return f"{code(_shown_file(_path_of(given)))}{share}"


def _path_of(given: Any) -> str:
    return str(given["path"] if isinstance(given, dict) else given)


def _is_on_hub(path: str) -> bool:
    name = path.partition(":")[0]
    return name.count("/") == 1 and not name.startswith((".", "~", "/")) and "." not in name.rpartition("/")[2] and not Path(name).exists()


def _count(number: int) -> str:
    return f"{number:,}" if number else UNKNOWN


def _run(stage: Stage) -> str:
    return f"{stage.method or 'training'}{f' ({code(stage.command)})' if stage.command else ''}"


def _training(made: Provenance) -> str:
    return "\n\n".join(["## Training", *map(_stage, reversed(made.stages))]) if made.stages else ""


def _stage(stage: Stage) -> str:
    steps = (
        f"{stage.step:,} of {counted(stage.total_steps, 'step')}"
        if stage.total_steps
        else f"{_count(stage.step)} step{'s' * (stage.step != 1)}"
    )
    of_rows = f" of {counted(stage.rows_per_step, 'row')}" if stage.rows_per_step else ""
    by = f", by verl {stage.version}" if stage.version else ""
    head = f"### {_run(stage)}\n\n{steps}{of_rows}{by}."
    if not stage.settings:
        return f"{head} All settings are the defaults."
    shown = redact({key: shortened(value) for key, value in stage.settings.items()})
    rows = "\n".join(row(code(key), code(_text(value))) for key, value in sorted(shown.items()))
    return f"{head} Settings that differ from the defaults:\n\n| setting | value |\n|---|---|\n{rows}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def shortened(value: Any) -> Any:
    """Return a value in which of each path, absolute or in the user's home, only the last part is left."""
    if isinstance(value, dict):
        return {key: shortened(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [shortened(child) for child in value]
    if not isinstance(value, str) or "\n" in value:
        return value
    return f"…/{Path(value).name}" if value.startswith(("/", "~/", str(Path.home()))) else value


def _shown_file(given: Any) -> str:
    """Return a file, a directory or a Hub name without the folders that it is in; several of them are joined."""
    if isinstance(given, list):
        return ", ".join(map(_shown_file, given))
    path = _path_of(given or UNKNOWN)
    return redact_text(path) if _is_on_hub(path) or path.startswith("hf://") else redact_text(Path(path).name or path)


def _scores(made: Provenance) -> str:
    if not made.scores:
        return "## Scores\n\nNone were found."
    rows = "\n".join(_score(one) for one in sorted(made.scores, key=lambda one: (one.of, str(one.directory))))
    return f"## Scores\n\n| model | test data | score | 95% interval | questions | answers to each |\n|---|---|---|---|---|---|\n{rows}"


def _score(scores: Scores) -> str:
    results = scores.results
    config = results.get("config", {})
    interval = results.get("confidence_interval_95")
    value = f"{results['exact_match']:.2%}" if interval else f"{results['exact_match']:.4f}"
    between = f"{interval[0]:.2%} to {interval[1]:.2%}" if isinstance(interval, list) and len(interval) == 2 else "–"
    data, drawn = code(_shown_file(config.get("test_file"))), f"{config.get('n', 1)} at temperature {config.get('temperature', 0)}"
    return row(scores.of, data, f"{_metric(scores)} {value}", between, _count(results.get("n", 0)), drawn)


def _metric(scores: Scores) -> str:
    metric = _shown_file(scores.results.get("config", {}).get("metric") or "gsm8k")
    return f"exact match ({metric})" if scores.results.get("confidence_interval_95") else f"mean score ({metric})"


def _format(facts: Facts) -> str:
    template = (
        "The tokenizer has the chat template of the training." if facts.has_template else "There is no chat template: it continues text."
    )
    stop = f" An answer ends with {' or '.join(map(code, facts.stop_tokens))}." if facts.stop_tokens else ""
    return f"## Chat template\n\n{template}{stop}"


def _limits(made: Provenance, facts: Facts) -> str:
    data = facts.base_metadata
    if licence := data.get("license"):
        name = f" ({data['license_name']})" if data.get("license_name") else ""
        line = f"The base model's card names the licence {code(_text(licence))}{name}, which its derivatives have to follow."
    else:
        line = "The licence of the base model was not found. Look it up and write it here before you share this model."
    language = data.get("language")
    names = ", ".join(map(str, language)) if isinstance(language, list) else str(language or "")
    spoken = f"The base model's card names these languages: {names}." if names else "Which languages it speaks is not known."
    return f"## Licence and language\n\n{line}\n\n{spoken}"


def code(text: str) -> str:
    """Return a text as code of Markdown, on one line."""
    flat = " ".join(text.split())
    flat = f"{flat[:LONGEST_VALUE]} …" if len(flat) > LONGEST_VALUE else flat
    return f"`` {flat} ``" if "`" in flat else f"`{flat}`"


def row(*cells: str) -> str:
    """Return a row of a table, in which a vertical bar is text."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _plain(text: str) -> str:
    return " ".join(text.split())


def notes(made: Provenance, facts: Facts) -> Sequence[str]:
    """Return what a user should know of a card before it is shared."""
    found = [f"left out of the card: {what}" for what in made.left_out]
    if not made.stages:
        found.append("the card says nothing of the training: no run was found; run=DIR names its directory")
    if "license" not in facts.base_metadata:
        found.append("the card says license: unknown: the base model's card was not found here; write it into README.md")
    return found
