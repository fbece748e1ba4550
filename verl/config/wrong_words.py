"""Errors about words of the command line that are no `key=value`, no option and no command."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

from verl.errors import UserError

# Words for a command that people bring from elsewhere.
COMMANDS = {
    "train": "sft",
    "finetune": "sft",
    "fine-tune": "sft",
    "tune": "sft",
    "lora": "sft",
    "rl": "ppo",
    "grpo": "ppo",
    "rlhf": "ppo",
    "dpo": "reward",
    "rm": "reward",
    "evaluate": "eval",
    "evaluation": "eval",
    "test": "eval",
    "predict": "eval",
    "infer": "chat",
    "inference": "chat",
    "generate": "chat",
    "talk": "chat",
    "merge": "export",
    "save": "export",
    "convert": "export",
    "check": "doctor",
    "env": "doctor",
    "info": "doctor",
    "version": "--version",
    "help": "--help",
}
DATA_ENDS = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".txt", ".gz", ".tsv", ".xlsx")
OPTIONS = {"v": "verl --version", "V": "verl --version", **dict.fromkeys(("gpu", "gpus", "num_gpus"), "--gpus N")}
# Options that take a number: an example, and what the number is.
NUMBERS = {
    "--gpus": ("2", "whole number of at least 1"),
    "--port": ("8080", "port: a whole number from 1 to 65535, at which the page is served"),
    "--random": ("3", "whole number of rows"),
}
DASHES = "‐‑‒–—−"  # that word processors write in place of a hyphen


def no_command(word: str, names: Sequence[str]) -> UserError:
    """Return the error of a command that does not exist.

    Args:
        names: the commands.
    """
    known = {**{name: name for name in names}, **{other: meant for other, meant in COMMANDS.items() if meant in names or meant[:1] == "-"}}
    near = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.65)
    if near:
        fix = f"did you mean verl {known[near[0]]}?"
    elif "=" in word:
        fix = f"name the command first: verl sft {word} …"
    else:
        fix = f"verl --help; the commands are {', '.join(names)}"
    return UserError(f"there is no command {word!r}", where="verl", fix=fix)


def refuse_misspelled(words: Sequence[str], options: Mapping[str, str], schema: type | None) -> None:
    """Raise UserError if a word is almost an option of its command.

    Args:
        words: the command and what follows it.
        options: the options of the command that are no keys, each with what stands for its value; an empty text: it takes none.
        schema: the command's config class, whose keys that are in no group are options too; None: it has no keys.
    """
    from verl.config.unknown_keys import HINTS

    known = {"--help": "", **options, **({} if schema is None else options_of(schema))}
    for number, word in enumerate(words):
        name, sign, value = word.partition("=")
        is_value = number > 0 and known.get(words[number - 1], "") != ""
        if is_value or not name.startswith("--") or name.replace("_", "-") in known or name[2:] in HINTS:
            continue
        for near in difflib.get_close_matches(name[2:], [option[2:] for option in known], n=1, cutoff=0.65):
            following = value if sign else next(iter(words[number + 1 : number + 2]), "")
            given = "" if not known[f"--{near}"] else known[f"--{near}"] if not following or following.startswith("-") else following
            raise UserError(f"there is no option {name!r}", where=f"verl {words[0]}", fix=f"write --{near} {given}".rstrip())


def options_of(schema: type) -> dict[str, str]:
    """Return the options of a command with keys, each with what stands for its value: a key that is in no group is one too."""
    hints = {field.name: get_type_hints(schema)[field.name] for field in fields(schema)}
    keys = {f"--{name.replace('_', '-')}": "" if hint is bool else "VALUE" for name, hint in hints.items() if not is_dataclass(hint)}
    return {"--config": "FILE", "--best": "", **keys}


def wrong_option(error: Exception, words: Sequence[str]) -> UserError | None:
    """Return an error of the command line's parser as a UserError; None if it is the help that is printed without arguments."""
    message = str(error.format_message()).rstrip(".")  # type: ignore[attr-defined]
    if not words or not message.strip():
        return None
    command = words[0] if not words[0].startswith("-") else ""
    where = f"verl {command}".strip()
    param, parser = getattr(error, "param", None), getattr(getattr(error, "ctx", None), "command", None)
    names = [*getattr(param, "opts", []), *([param.name] if param is not None and param.name else [])]
    if param is not None and message.lower().startswith("missing argument"):
        fix = f"write {where} {param.metavar or names[-1].upper()}"
    elif param is not None and names[0] in NUMBERS:
        example, meaning = NUMBERS[names[0]]
        given = next((f"{words[n + 1]!r}" for n, word in enumerate(words[:-1]) if word == names[0]), "the value")
        given = next((repr(word.partition("=")[2]) for word in words if word.startswith(f"{names[0]}=")), given)
        message, fix = f"invalid value for '{names[0]}': {given} is no {meaning}", f"write {where} {names[0]} {example}"
    elif (name := getattr(error, "option_name", None)) and "requires an argument" in message:
        meant = next((one for one in getattr(parser, "params", []) if name in one.opts), None)
        message, fix = f"{name} has no value", f"write {where} {name} {NUMBERS.get(name, (getattr(meant, 'metavar', None) or 'VALUE',))[0]}"
    elif "unexpected extra argument" in message and parser is not None:
        extra = message.rpartition(" (")[2].rstrip(")")
        takes = [option for one in parser.params for option in one.opts if option == "--dir"]
        message = f"there is one word too many: {extra}"
        fix = f"write {where} {takes[0]} {extra}" if takes else f"remove it: {where} takes one {parser.params[0].metavar}"
    else:
        fix = f"{where} --help lists what there is"
    return UserError(message[:1].lower() + message[1:], where=where, fix=fix)


def unreadable(word: str, following: Sequence[str], known: Sequence[str]) -> UserError:
    """Return the error of a word that is no assignment.

    Args:
        following: the words after it.
        known: the keys of the command.
    """
    from verl.config.unknown_keys import nearest
    from verl.run_directory import RESULTS, folder_of_runs

    plain = word.lstrip("-" + DASHES)
    if following[:1] == ["="]:
        shown = f"{plain}={following[1] if len(following) > 1 else '<value>'}"
        return UserError(f"there is a space beside the = after {word!r}", fix=f"write {shown}, without spaces")
    value = following[0] if following and "=" not in following[0] else None
    if word.startswith(("-", *DASHES)):
        if plain in OPTIONS:
            return UserError(f"there is no option {word!r} here", fix=f"write {OPTIONS[plain]}")
        name, _, text = plain.partition("=")
        meant, is_absent = (name, False) if name in known else nearest(name, list(known))
        if not meant:
            return UserError(f"there is no option {word!r}, and no key of such a name", fix="remove it; --help lists all keys")
        shown = meant if is_absent else f"write {meant}={text or value or '<value>'}"
        return UserError(f"there is no option {word!r}", fix=f"{shown}; keys have no dash, and --help lists all")
    if word.endswith((".yaml", ".yml")):
        return UserError(f"{word!r} is a file, and no key names it", fix=f"write --config {word}")
    place = Path(word).expanduser()
    if word.lower().endswith(DATA_ENDS):
        key = next((key for key in ("data.train_files", "test_file") if key in known), None)
        fix = f"write {key}={word}" if key else "remove it; --help lists all keys"
        return UserError(f"{word!r} is a file, and no key names it", fix=fix)
    if "against" in known and (place / RESULTS).is_file():
        return UserError(
            f"{word!r} is an evaluation, and no key names it", fix=f"verl eval {word} --against OTHER compares it with another"
        )
    if place.is_dir() or word.count("/") == 1:
        key = next((key for key in ("model.partial_pretrain", "compare", "model_path") if key in known), None)
        if key and (found := folder_of_runs(word, lambda run: f"{key}={run}")) is not None:
            return found
        fix = (
            f"write {key}={word}{' test_file=… output_dir=…' if 'test_file' in known else ''}"
            if key
            else "remove it; --help lists all keys"
        )
        return UserError(f"{word!r} is a model or a directory, and no key names it", fix=fix)
    if ":" in word and not word.startswith((":", "/")):
        name, _, text = word.partition(":")
        return UserError(f"{word!r} has a colon in place of =", fix=f"write {name}={text.strip() or (value or '<value>')}")
    if word in known:
        return UserError(f"{word!r} has no value", fix=f"write {word}={'<value>' if value is None else value}")
    example = "optim.lr=1e-5" if "optim.lr" in known else "seed=1" if "seed" in known else "dtype=float32"
    return UserError(f"{word!r} is no key with a value", fix=f"write each key with its value, such as {example}; --help lists all keys")
