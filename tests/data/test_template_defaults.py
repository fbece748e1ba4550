"""Values of a template's variables become part of the template, so that a checkpoint asks as it was trained."""

from typing import Any

import families
import pytest

from verl.data.render import Renderer
from verl.data.template_defaults import set_defaults
from verl.errors import UserError

SWITCH = families.CHATML + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}{{ '<quiet>' }}{% endif %}"
QUESTION = [{"role": "user", "content": "2+2?"}]


def prompt(values: dict[str, Any], template: str = SWITCH, **row: Any) -> str:
    tokenizer = families.chatml(template)
    set_defaults(tokenizer, values)
    return str(tokenizer.decode(Renderer(tokenizer).prompt(QUESTION, None, row or None)))


def test_a_default_is_what_the_template_reads() -> None:
    plain = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt({"enable_thinking": True}) == plain
    assert prompt({"enable_thinking": False}) == f"{plain}<quiet>"
    assert prompt({"enable_thinking": False}, enable_thinking=True) == plain  # a row's own value


def test_transformers_reads_the_default_too() -> None:
    tokenizer = families.chatml(SWITCH)
    set_defaults(tokenizer, {"enable_thinking": False})
    shown: Any = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert shown.endswith("<quiet>") and shown == prompt({"enable_thinking": False})
    once = tokenizer.chat_template
    set_defaults(tokenizer, {"enable_thinking": False})
    assert tokenizer.chat_template == once


@pytest.mark.parametrize("value", ['a "quote" \\ and\nlines', "你好 😀 %} }}", 1.5, -3, True, [1, "a", {"b": None}], {"a": {"b": [True]}}])
def test_values_reach_the_template_unchanged(value: Any) -> None:
    import json

    template = "{{ x | tojson }}" + families.CHATML
    shown = prompt({"x": value}, template).partition("<|im_start|>")[0]
    assert json.loads(shown) == value


def test_a_template_without_the_variable_is_refused() -> None:
    with pytest.raises(UserError, match="does not use the variable 'enable_thinking'") as caught:
        prompt({"enable_thinking": False}, families.CHATML)
    assert caught.value.where == "chat_template_kwargs"


def test_a_template_keeps_its_own_first_line() -> None:
    assert prompt({"x": 1}, "\n{{ x }}" + families.CHATML).startswith("1<|im_start|>") == families_first_line_is_trimmed()


def families_first_line_is_trimmed() -> bool:
    tokenizer = families.chatml("\n{{ 1 }}" + families.CHATML)
    return str(tokenizer.apply_chat_template(QUESTION, tokenize=False)).startswith("1<|im_start|>")
