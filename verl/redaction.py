"""Removal of secrets from everything that is written or leaves the machine: config.yaml, results.json, logs, messages, loggers' configs.

The patterns of keys follow the published rules of detect-secrets (Yelp) and extend them; docs/dependencies.md says why it is not a
dependency.
"""

import re
from functools import lru_cache
from typing import Any

HIDDEN = "[hidden]"

# Texts that are secrets under any name.
_KEYS = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{12,}|sk-[A-Za-z0-9_\-]{12,}|wandb_v1_\w{12,}"  # Hugging Face; OpenAI, Anthropic and similar services
    r"|(?:AKIA|ASIA|ABIA|ACCA|A3T[A-Z0-9])[A-Z0-9]{12,}"  # AWS
    r"|(?:gh[pousr]_|github_pat_)\w{12,}|gl(?:pat|dt|ft|soat|rt|cbt|ptt)-[\w\-]{12,}"  # GitHub, GitLab
    r"|xox[abeoprs]-[A-Za-z0-9\-]{8,}|xapp-[A-Za-z0-9\-]{8,}|hooks\.slack\.com/services/[\w/]+"  # Slack
    r"|AIza[\w\-]{20,}|ya29\.[\w\-]{12,}"  # Google
    r"|[rs]k_(?:live|test)_\w{12,}|SG\.[\w\-]{16,}\.[\w\-]{16,}|npm_\w{20,}|pypi-[\w\-]{20,}"  # Stripe, SendGrid, npm, PyPI
    r")"
)
# A JSON Web Token. Like the patterns below, it also matches what only starts like one, so that no character is searched twice: the time
# grows with the length of the text, not with its square.
_WEB_TOKEN = re.compile(r"(?<![A-Za-z0-9])eyJ[\w\-]{8,}(?P<rest>\.[\w\-]{8,}(?:\.[\w\-]*)?)?")
_PRIVATE_KEY = re.compile(r"-----BEGIN ([A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?)-----.*?(?:-----END \1-----|\Z)", re.DOTALL)
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+(?=\S*[\d=]|\S{20})[A-Za-z0-9._~+/=\-]{8,}")
_URL_LOGIN = re.compile(r"(?<=://)[^/?#\s]+@")
# `(?=(...))\1` matches once and is not tried again with fewer characters.
_URL_PARAMETER = re.compile(
    r"(?i)[?&]+(?:(?=(?P<name>[^=&\s]*?(?:token|secret|password|passwd|pwd|key|signature|sig)[^=&\s]*))(?P=name)=[^&\s]+|[^=&\s]*)"
)
_ASSIGNED = re.compile(
    r"(?<![\w.\-])(?P<before>(?:(?![A-Za-z_])[\w.\-])*)(?P<name>[A-Za-z_][\w.\-]*)"
    r"""(?P<sign>["']?\s*[=:]\s*)(?P<value>"[^"\n]*"|'[^'\n]*'|[^\s,;&"'\[\]{}()]+)"""
)

# Words of a key's name.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORDS = {"secret", "pwd", "pass", "passphrase", "credential", "credentials", "authorization", "bearer", "apikey", "cookie"}
_KEY_OWNERS = set(
    "api access private secret ssh signing encryption account auth service deploy license wandb openai hf huggingface hub aws azure".split()
)
# Words that make a token one of a vocabulary, or a number of tokens.
_VOCABULARY = set(
    "pad eos bos unk sep cls mask stop special added image audio start end begin num number max min per id ids count limit level dp "
    "loss next first last new total type mean control type".split()
)
_NUMBER = re.compile(r"[-+.\d_eE]+|true|false|null|none|auto", re.IGNORECASE)


def redact(value: Any, name: str = "") -> Any:
    """Return a copy of nested plain values in which every secret is replaced by `[hidden]`.

    Args:
        name: the name of the value, such as a config key. A text under the name of a secret is hidden whatever it is.
    """
    if isinstance(value, dict):
        return {key: redact(child, str(key)) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [redact(child, name) for child in value]
    if not isinstance(value, str):
        return value
    return HIDDEN if value and is_secret_name(name) else redact_text(value)


def redact_text(text: str) -> str:
    """Return a text, such as a message, with every secret in it replaced by `[hidden]`."""
    text = _PRIVATE_KEY.sub(HIDDEN, text)
    text = _WEB_TOKEN.sub(lambda found: HIDDEN if found["rest"] else found[0], text)
    text = _KEYS.sub(HIDDEN, text)
    text = _BEARER.sub(rf"\1 {HIDDEN}", text)
    text = _URL_LOGIN.sub(f"{HIDDEN}@", text)
    text = _URL_PARAMETER.sub(_without_parameter, text)
    return _ASSIGNED.sub(_without_value, text)


def holds_secret(text: str) -> bool:
    """Return whether a text has a secret that can be recognised without its name."""
    return redact_text(text) != text


@lru_cache(maxsize=1024)
def is_secret_name(name: str) -> bool:
    """Return whether a name, such as `wandb.api_key` or `HF_TOKEN`, is that of a secret. `pad_token` and `data.prompt_key` are none."""
    words = [word.lower() for word in _WORD.findall(name.rpartition(".")[2])]
    if not words:
        return False
    if _SECRET_WORDS & {*words} or any(word.startswith("passw") or word.endswith(("apikey", "password", "passwd")) for word in words):
        return True
    if any(word.endswith("token") for word in words):
        return not _VOCABULARY & {*words}
    return words[-1] == "key" and (len(words) == 1 or bool(_KEY_OWNERS & {*words}))


def _without_parameter(found: re.Match[str]) -> str:
    return found[0] if found["name"] is None else f"{found[0][: found.end('name') - found.start()]}={HIDDEN}"


def _without_value(found: re.Match[str]) -> str:
    """Hide the value of `name=value` or `name: value`. After a colon, `token` and `key` are words of a sentence."""
    name, sign, value = found["name"], found["sign"], found["value"]
    is_word = ":" in sign and name.lower() in ("token", "key", "pass") and sign[0] not in "\"'"
    if is_word or not is_secret_name(name) or _NUMBER.fullmatch(value.strip("\"'")) or value.startswith(("${", "<", "…")):
        return found[0]
    quote = value[0] if value[0] in "\"'" else ""
    return f"{found['before']}{name}{sign}{quote}{HIDDEN}{quote}"
