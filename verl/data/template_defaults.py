"""Default values of a chat template's variables, such as `enable_thinking`, written into the template itself.

The checkpoint is saved with this template. So everything that loads it (the evaluator, the chat, vLLM, transformers) asks with the values
of the training.
"""

import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from verl.data.messages import read_template_kwargs
from verl.errors import UserError

WHERE = "chat_template_kwargs"


def set_defaults(tokenizer: PreTrainedTokenizerBase, values: Mapping[str, Any]) -> None:
    """Give variables of the tokenizer's chat template default values; a row's own values come before them.

    Raises:
        UserError: there is no chat template, or it has no such variable, or a value is not JSON.
    """
    templates = tokenizer.chat_template
    named = templates if isinstance(templates, dict) else {"default": templates or ""}
    values = read_template_kwargs(dict(values))
    for name in values:
        if not any(re.search(rf"\b{re.escape(name)}\b", template) for template in named.values()):
            what = f"the chat template does not use the variable {name!r}"
            raise UserError(what, where=WHERE, fix="remove it, or set data.chat_template to a template that uses it")
    lines = [f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}" for name, value in values.items()]
    begin = "".join(lines) + "\n"  # this line end is not printed: templates are compiled with trim_blocks
    written = {name: template if template.startswith(begin) else begin + template for name, template in named.items()}
    tokenizer.chat_template = written if isinstance(templates, dict) else written["default"]


def _literal(value: object) -> str:
    """Return a value in Jinja's syntax."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        escaped = value.encode("unicode_escape").decode("ascii").replace('"', '\\"')
        return f'"{escaped}"'
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(name))}: {_literal(item)}" for name, item in value.items()) + "}"
    raise UserError(f"found {type(value).__name__}", where=WHERE, fix="give text, numbers, true, false, lists or objects")
