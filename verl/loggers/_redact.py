"""Removal of secrets from a configuration before it leaves the machine."""

import re
from typing import Any

HIDDEN = "[hidden]"

# Names of keys whose text is a secret. A number is never one, as in max_new_tokens=512.
_SECRET_NAME = re.compile(r"(?i)(token|secret|password|passwd|credential|api_?key|access_?key|private_?key)")
# Texts that are secrets under any name: keys of Hugging Face, OpenAI and similar services, AWS, GitHub.
_SECRET_TEXT = re.compile(r"\b(?:hf_|sk-|AKIA|ASIA|gh[pousr]_|github_pat_)[A-Za-z0-9_\-]{12,}")
# The user and password of a URL, and secrets among its parameters.
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
_URL_PARAMETER = re.compile(r"(?i)(?<=[?&])([^=&\s]*(?:token|secret|password|key|signature)[^=&\s]*)=[^&\s]+")


def redact(value: Any, name: str = "") -> Any:
    """Return a copy of nested plain values in which every secret is replaced by `[hidden]`."""
    if isinstance(value, dict):
        return {key: redact(child, str(key)) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [redact(child, name) for child in value]
    if not isinstance(value, str):
        return value
    if _SECRET_NAME.search(name):
        return HIDDEN
    text = _SECRET_TEXT.sub(HIDDEN, value)
    text = _URL_LOGIN.sub(f"{HIDDEN}@", text)
    return _URL_PARAMETER.sub(rf"\1={HIDDEN}", text)
