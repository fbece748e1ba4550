"""Errors about words of the command line that are no `key=value`, no option and no command."""

import difflib
from collections.abc import Sequence
from pathlib import Path

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


def wrong_option(error: Exception, words: Sequence[str]) -> UserError | None:
    """Return an error of the command line's parser as a UserError; None if it is the help that is printed without arguments."""
    message = str(error.format_message()).rstrip(".")  # type: ignore[attr-defined]
    if not words or not message.strip():
        return None
    command = words[0] if not words[0].startswith("-") else ""
    param = getattr(error, "param", None)
    names = [*getattr(param, "opts", []), *([param.name] if param is not None and param.name else [])]
    example = "--gpus 2" if "--gpus" in names else ""
    if message.lower().startswith("missing argument") and param is not None:
        example = str(param.metavar or names[-1].upper())
    fix = " ".join(part for part in ("write verl", command, example or "--help", "" if example else "for what there is") if part)
    return UserError(message[:1].lower() + message[1:], where=f"verl {command}".strip(), fix=fix)


def unreadable(word: str, following: Sequence[str], known: Sequence[str]) -> UserError:
    """Return the error of a word that is no assignment.

    Args:
        following: the words after it.
        known: the keys of the command.
    """
    from verl.config.unknown_keys import nearest

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
        shown = meant if is_absent else f"write {meant or name}={text or value or '<value>'}"
        return UserError(f"there is no option {word!r}", fix=f"{shown}; keys have no dash, and --help lists all")
    if word.endswith((".yaml", ".yml")):
        return UserError(f"{word!r} is a file, and no key names it", fix=f"write --config {word}")
    place = Path(word).expanduser()
    if word.lower().endswith(DATA_ENDS):
        key = next((key for key in ("data.train_files", "test_file") if key in known), None)
        fix = f"write {key}={word}" if key else "remove it; --help lists all keys"
        return UserError(f"{word!r} is a file, and no key names it", fix=fix)
    if place.is_dir() or word.count("/") == 1:
        key = next((key for key in ("model.partial_pretrain", "compare", "model_path") if key in known), None)
        fix = f"write {key}={word}" if key else "remove it; --help lists all keys"
        return UserError(f"{word!r} is a model or a directory, and no key names it", fix=fix)
    if ":" in word and not word.startswith((":", "/")):
        name, _, text = word.partition(":")
        return UserError(f"{word!r} has a colon in place of =", fix=f"write {name}={text.strip() or (value or '<value>')}")
    if word in known:
        return UserError(f"{word!r} has no value", fix=f"write {word}={'<value>' if value is None else value}")
    return UserError(f"{word!r} is no key with a value", fix="write each key with its value, such as optim.lr=1e-5; --help lists all keys")
