"""What must not leave the machine with a configuration."""

import re
from typing import Any

HIDDEN = "[hidden]"

# Names of keys whose text is a secret. A number under such a name is none: max_new_tokens=512.
_SECRET_NAME = re.compile(r"(?i)(token|secret|password|passwd|credential|api_?key|access_?key|private_?key)")
# Texts that are secrets under any name: keys of Hugging Face, OpenAI and its likes, AWS, GitHub.
_SECRET_TEXT = re.compile(r"\b(?:hf_|sk-|AKIA|ASIA|gh[pousr]_|github_pat_)[A-Za-z0-9_\-]{12,}")
# The user and password of a URL, and secrets among its parameters.
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
_URL_PARAMETER = re.compile(r"(?i)(?<=[?&])([^=&\s]*(?:token|secret|password|key|signature)[^=&\s]*)=[^&\s]+")


def redact(value: Any, name: str = "") -> Any:
    """The same nested plain values with every secret's text replaced by `[hidden]`."""
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
