"""The chat templates of well-known models: every text of a turn is trained, counted or refused, and no token of a prompt is trained."""

import importlib.util
from itertools import groupby
from pathlib import Path
from typing import Any

import families
import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from verl.data.chat import ChatInput
from verl.data.render import Rendered, Renderer
from verl.data.template_end import add_end
from verl.errors import UserError

Messages = list[dict[str, Any]]

FOUND = importlib.util.find_spec("trl")
TEMPLATES = Path(FOUND.origin).parent / "chat_templates" if FOUND is not None and FOUND.origin else None
needs_trl = pytest.mark.skipif(TEMPLATES is None, reason="needs the templates of models that trl ships")

THINK = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
PARTS = ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end", "outputs▁begin", "output▁begin", "output▁end", "outputs▁end")
DEEPSEEK = tuple(f"<｜tool▁{part}｜>" for part in PARTS)
COHERE = [
    "<BOS_TOKEN>",
    *(f"<|{name}_TOKEN|>" for name in ("START_OF_TURN", "END_OF_TURN", "SYSTEM", "USER", "CHATBOT")),
    "<|START_RESPONSE|>",
    "<|END_RESPONSE|>",
]
FAMILIES: dict[str, tuple[list[Any], tuple[str, ...], dict[str, str]]] = {
    "qwen": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], THINK, {"eos_token": "<|im_end|>"}),
    "llama": (
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"],
        (),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "gemma": (["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], (), {"bos_token": "<bos>", "eos_token": "<eos>"}),
    "deepseek": (
        ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"],
        ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", *DEEPSEEK),
        {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"},
    ),
    "gptoss": (["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"], (), {"eos_token": "<|return|>"}),
    "glm": (
        ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"],
        THINK,
        {"eos_token": "<|endoftext|>"},
    ),
    "cohere": (COHERE, (), {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>"}),
    "nemotron": (["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"], THINK, {"bos_token": "<s>", "eos_token": "<|im_end|>"}),
    "phi": (["<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"], (), {"eos_token": "<|im_end|>"}),
    "mistral": (
        [
            "<s>",
            "</s>",
            *(f"[{end}{name}]" for name in ("INST", "AVAILABLE_TOOLS", "TOOL_RESULTS") for end in ("", "/")),
            "[TOOL_CALLS]",
        ],
        (),
        {"bos_token": "<s>", "eos_token": "</s>"},
    ),
}
# After the model's documentation: https://huggingface.co/microsoft/phi-4
PHI4 = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '<|im_sep|>' + message.content + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
# After the documentation of mistral-common's third tokenizer: calls and results of tools between control tokens.
MISTRAL = (
    "{{ bos_token }}"
    "{% if tools %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '[INST] ' + message.content + '[/INST]' }}"
    "{% elif message.role == 'tool' %}{{ '[TOOL_RESULTS] ' + {'content': message.content} | tojson + '[/TOOL_RESULTS]' }}"
    "{% elif message.tool_calls %}{{ '[TOOL_CALLS] [' }}"
    "{% for call in message.tool_calls %}{{ call.function | tojson }}{% endfor %}{{ ']' + eos_token }}"
    "{% elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}"
    "{% else %}{{ raise_exception('only user, assistant and tool') }}{% endif %}{% endfor %}"
)
WRITTEN = {"phi4": PHI4, "mistral": MISTRAL}


def tokenizer_of(family: str, name: str) -> PreTrainedTokenizerFast:
    if name not in WRITTEN and TEMPLATES is None:
        pytest.skip("needs the templates of models that trl ships")
    special, added, names = FAMILIES[family]
    template = WRITTEN[name] if name in WRITTEN else (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return families.byte_level(template, special, added, **names)


def trained(tokenizer: PreTrainedTokenizerBase, rendered: Rendered) -> list[str]:
    """The text of each unbroken run of trained tokens."""
    runs = groupby(zip(rendered.input_ids, rendered.loss_mask, strict=True), key=lambda token: token[1])
    return [str(tokenizer.decode([number for number, _ in run])) for is_trained, run in runs if is_trained]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def thinking(thought: str, text: str) -> dict[str, Any]:
    return assistant(f"<think>\n{thought}\n</think>\n\n{text}")


TOOL = {"type": "function", "function": {"name": "look_up", "description": "finds", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "id": "call00001", "function": {"name": "look_up", "arguments": {"place": 'the "Röme"'}}}
ONE = [user("2+2?"), assistant("four")]
TWO = [*ONE, user("sure?"), assistant("yes")]
THOUGHTS = [user("2+2?"), thinking("add them", "four"), user("sure?"), thinking("so it is", "yes")]
REASONING = [user("2+2?"), assistant("four", reasoning_content="add them"), user("sure?"), assistant("yes", reasoning_content="so it is")]
TOOLS = [user("weather?"), assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "sun"}, assistant("sunny")]
HISTORY = "earlier turns are context: the chat template writes them without the thought that its prompt for an answer begins"
QWEN_CALL = '<tool_call>\n{"name": "look_up", "arguments": {"place": "the \\"Röme\\""}}\n</tool_call><|im_end|>'
QWEN35_CALL = '<tool_call>\n<function=look_up>\n<parameter=place>\nthe "Röme"\n</parameter>\n</function>\n</tool_call><|im_end|>'
COHERE_END = "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
NO_THOUGHT = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("family", "name", "messages", "expected"),
    [
        ("qwen", "qwen2_5", TWO, ["four<|im_end|>", "yes<|im_end|>"]),
        ("qwen", "qwen2_5", TOOLS, [QWEN_CALL, "sunny<|im_end|>"]),
        ("qwen", "qwen2_5_training", TWO, ["four<|im_end|>", "yes<|im_end|>"]),
        ("qwen", "qwen3", TWO, ["four<|im_end|>", f"{NO_THOUGHT}yes<|im_end|>"]),
        ("qwen", "qwen3", TOOLS, [QWEN_CALL, f"{NO_THOUGHT}sunny<|im_end|>"]),
        ("qwen", "qwen3", THOUGHTS, ["four<|im_end|>", "<think>\nso it is\n</think>\n\nyes<|im_end|>"]),
        ("qwen", "qwen3", REASONING, ["four<|im_end|>", "<think>\nso it is\n</think>\n\nyes<|im_end|>"]),
        ("qwen", "qwen3_instruct_2507", TWO, ["four<|im_end|>", "yes<|im_end|>"]),
        ("qwen", "qwen3_5_think", ONE, ["\n</think>\n\nfour<|im_end|>"]),
        ("qwen", "qwen3_5_think", THOUGHTS, ["so it is\n</think>\n\nyes<|im_end|>"]),
        ("qwen", "qwen3_5_think", REASONING, ["so it is\n</think>\n\nyes<|im_end|>"]),
        ("qwen", "qwen3_5_think", TOOLS, [f"\n</think>\n\n{QWEN35_CALL}", "\n</think>\n\nsunny<|im_end|>"]),
        ("qwen", "qwen3_5_nothink", ONE, ["four<|im_end|>"]),
        ("qwen", "qwen3_5_nothink", TOOLS, [QWEN35_CALL, "sunny<|im_end|>"]),
        ("qwen", "qwen3_8", THOUGHTS, ["add them\n</think>\n\nfour<|im_end|>", "so it is\n</think>\n\nyes<|im_end|>"]),
        ("llama", "llama3", TWO, ["four<|eot_id|>", "yes<|eot_id|>"]),
        ("llama", "llama3_1", TOOLS, ['{"name": "look_up", "parameters": {"place": "the \\"Röme\\""}}<|eot_id|>', "sunny<|eot_id|>"]),
        ("gemma", "gemma3", TWO, ["four<end_of_turn>", "yes<end_of_turn>"]),
        ("mistral", "mistral", TWO, [" four</s>", " yes</s>"]),
        ("mistral", "mistral", TOOLS, ['[TOOL_CALLS] [{"name": "look_up", "arguments": {"place": "the \\"Röme\\""}}]</s>', " sunny</s>"]),
        ("phi", "phi4", TWO, ["four<|im_end|>", "yes<|im_end|>"]),
        ("deepseek", "deepseek_r1_distill", ONE, ["\n</think>\n\nfour<｜end▁of▁sentence｜>"]),
        ("deepseek", "deepseek_r1_distill", THOUGHTS, ["so it is\n</think>\n\nyes<｜end▁of▁sentence｜>"]),
        ("deepseek", "deepseek_r1_distill", REASONING, ["so it is\n</think>\n\nyes<｜end▁of▁sentence｜>"]),
        ("gptoss", "gptoss", TWO, ["<|channel|>final<|message|>four<|end|>", "<|channel|>final<|message|>yes<|return|>"]),
        (
            "gptoss",
            "gptoss",
            [
                TOOLS[0],
                assistant(None, thinking="ask it", tool_calls=[CALL]),
                TOOLS[2],
                assistant("sunny", thinking="the sun"),
            ],
            [
                "<|channel|>analysis<|message|>ask it<|end|><|start|>assistant to=functions.look_up<|channel|>commentary json"
                '<|message|>{"place": "the \\"Röme\\""}<|call|>',
                "<|channel|>analysis<|message|>the sun<|end|><|start|>assistant<|channel|>final<|message|>sunny<|return|>",
            ],
        ),
        ("cohere", "cohere2", TWO, [f"four{COHERE_END}", f"yes{COHERE_END}"]),
        ("cohere", "cohere2_training", TWO, [f"four{COHERE_END}", f"yes{COHERE_END}"]),
        ("deepseek", "deepseekv3", ONE, ["\n</think>\n\nfour<｜end▁of▁sentence｜>"]),
        ("deepseek", "deepseekv3", TWO, ["\n</think>\n\nyes<｜end▁of▁sentence｜>"]),
        ("deepseek", "deepseekv3", THOUGHTS, ["so it is\n</think>\n\nyes<｜end▁of▁sentence｜>"]),
        ("deepseek", "deepseekv3", TOOLS, ["sunny<｜end▁of▁sentence｜>"]),
        ("nemotron", "nemotron_3_nano", ONE, ["</think>four<|im_end|>"]),
        ("nemotron", "nemotron_3_nano", TWO, ["</think>yes<|im_end|>"]),
        ("nemotron", "nemotron_3_super", THOUGHTS, ["so it is\n</think>\n\nyes<|im_end|>"]),
        ("nemotron", "nemotron_3_ultra", REASONING, ["so it is</think>yes<|im_end|>"]),
        ("glm", "glm4moe_training", TWO, ["\n<think></think>\nfour<|user|>", "\n<think></think>\nyes<|user|>"]),
        ("glm", "glm4moe_training", THOUGHTS, ["\n<think></think>\nfour<|user|>", "\n<think>so it is</think>\nyes<|user|>"]),
    ],
)
def test_trained_tokens_are_the_assistants_text_and_its_stop_token(family: str, name: str, messages: Messages, expected: list[str]) -> None:
    tokenizer = tokenizer_of(family, name)
    tools = [TOOL] if messages[-1]["content"] == "sunny" else None
    assert trained(tokenizer, Renderer(tokenizer).chat(messages, tools)) == expected


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen", "qwen2_5"),
        ("qwen", "qwen3"),
        ("qwen", "qwen3_instruct_2507"),
        ("qwen", "qwen3_5_think"),
        ("qwen", "qwen3_5_nothink"),
        ("qwen", "qwen3_8"),
        ("llama", "llama3_1"),
        ("gemma", "gemma3"),
        ("mistral", "mistral"),
        ("phi", "phi4"),
        ("deepseek", "deepseek_r1_distill"),
        ("deepseek", "deepseekv3"),
        ("nemotron", "nemotron_3_nano"),
        ("nemotron", "nemotron_3_ultra"),
        ("cohere", "cohere2"),
        ("cohere", "cohere2_training"),
        ("gptoss", "gptoss"),
        ("glm", "glm4moe_training"),
    ],
)
@pytest.mark.parametrize("messages", [ONE, TWO, [{"role": "system", "content": "Be short."}, *TWO], THOUGHTS, REASONING, TOOLS])
def test_the_text_is_the_prompt_and_the_answer(family: str, name: str, messages: Messages) -> None:
    """Nothing is lost either: each text is in the trained tokens, or a note or an error names what is left out."""
    tokenizer = tokenizer_of(family, name)
    renderer, tools = Renderer(tokenizer), [TOOL] if messages is TOOLS else None
    (rendered,) = renderer.chats([ChatInput(messages, tools)])
    if isinstance(rendered, UserError):
        assert any(word in rendered.what for word in ("reasoning_content", "rejects the chat", "calls", "closes the thought", "tool"))
        return
    prompt = renderer.prompt(messages[:-1], tools)
    assert rendered.input_ids[: len(prompt)] == prompt
    assert rendered.loss_mask[len(prompt) - 1 : len(prompt) + 1] == [False, True]
    said = "".join(trained(tokenizer, rendered))
    for text in ("four", "yes", "sunny", "add them", "so it is", "look_up"):
        if any(text in str(message) for message in messages if message["role"] == "assistant"):
            assert text in said or rendered.notes
    for text in ("2+2?", "sure?", "weather?", "Be short.", "sun<", "user"):
        assert text not in said.replace("<|user|>", "")


@pytest.mark.parametrize(
    ("family", "name", "messages", "tools", "what"),
    [
        ("qwen", "qwen2_5", REASONING, None, "in 'reasoning_content'"),
        ("llama", "llama3", REASONING, None, "in 'reasoning_content'"),
        ("llama", "llama3", TOOLS, None, "omits the assistant's calls"),
        ("llama", "llama3", ONE, [TOOL], "does not show the tool 'look_up'"),
        ("qwen", "qwen2_5", [user("2+2?"), assistant(None, refusal="I refuse.")], None, "in 'refusal'"),
        ("qwen", "qwen2_5", [{"role": "developer", "content": "Be short."}, *ONE], None, "leaves out 'content' of this message"),
        ("qwen", "qwen3_5_think", [{"role": "developer", "content": "Be short."}, *ONE], None, "rejects the chat: Unexpected message role"),
        ("qwen", "qwen3_5_nothink", THOUGHTS, None, "closes the thought"),
        ("qwen", "qwen3", [user("2+2?"), assistant("<think>\nAdd and")], None, "the thought is not closed"),
        ("qwen", "qwen3_5_think", [user("2+2?"), assistant("<think>\nAdd and")], None, "the thought is not closed"),
        ("deepseek", "deepseek_r1_distill", [user("2+2?"), assistant("<think>\nAdd and")], None, "the thought is not closed"),
        ("qwen", "qwen3", [user("2+2?"), assistant("<think>Add.</think>4", reasoning_content="Count.")], None, "and one in the content"),
        ("qwen", "qwen3_training", [user("2+2?"), assistant("<think>Add.</think>4", reasoning="Add.")], None, "and one in the content"),
        ("gemma", "gemma3", [assistant("Hello."), *ONE], None, "rejects the chat: Conversation roles must alternate"),
        ("glm", "glm4moe", ONE, None, "ends the assistant turn without a control token"),
        ("qwen", "qwen3", [user("2+2?"), assistant("four", cot="Add them.")], None, "text in 'cot'"),
        ("qwen", "qwen2_5", [user("2+2?"), assistant("four", thoughts=["Add", "them."])], None, "text in 'thoughts'"),
        (
            "qwen",
            "qwen3_5_think",
            [user("2+2?"), assistant("four", reasoning_details=[{"type": "reasoning.text", "text": "Add them."}])],
            None,
            "text in 'reasoning_details'",
        ),
        ("qwen", "qwen3", [user("2+2?"), assistant("four", Complex_CoT="Add them.")], None, "text in 'Complex_CoT'"),
        (
            "qwen",
            "qwen3",
            [user("2+2?"), assistant("four", rationale="Add."), user("sure?"), assistant("yes")],
            None,
            "text in 'rationale'",
        ),
        (
            "qwen",
            "qwen3",
            [user("2+2?"), assistant("four", reasoning="Add them.", reasoning_details=[{"type": "reasoning.encrypted", "data": "x"}])],
            None,
            "text in 'reasoning_details'",
        ),
    ],
)
def test_what_a_template_cannot_write_is_refused(family: str, name: str, messages: Messages, tools: Any, what: str) -> None:
    with pytest.raises(UserError) as caught:
        Renderer(tokenizer_of(family, name)).chat(messages, tools)
    assert what in caught.value.what and caught.value.fix


@pytest.mark.parametrize(
    ("name", "messages", "notes"),
    [
        ("qwen3", TWO, ()),
        ("qwen3", THOUGHTS, ("<think> of earlier turns is left out by the chat template",)),
        ("qwen3", REASONING, ("reasoning_content of earlier turns is left out by the chat template",)),
        ("qwen3_5_think", TWO, (HISTORY,)),
        ("qwen3_5_think", THOUGHTS, (HISTORY, "<think> of earlier turns is left out by the chat template")),
        ("qwen3", [user("2+2?"), {**assistant("four"), "mood": "glad"}], ("key 'mood' of messages is not printed by the chat template",)),
        ("qwen3", [{**user("2+2?"), "name": "Ann"}, assistant("four")], ("key 'name' of messages is not printed by the chat template",)),
        (
            "qwen3",
            [{**user("2+2?"), "tools": '[{"name": "f"}]'}, assistant("4")],
            ("key 'tools' of messages is not printed by the chat template",),
        ),
        ("qwen3", [user("2+2?"), assistant("four", reasoning="Add.", reasoning_content="Add.")], ()),
        ("qwen3", [user("2+2?"), assistant("four", reasoning="Add.", reasoning_details=[{"type": "reasoning.text", "text": "Add."}])], ()),
        (
            "qwen3",
            [user("2+2?"), assistant("<think>\nAdd.\n</think>\n\nfour", thinking_blocks=[{"type": "thinking", "thinking": "Add."}])],
            (),
        ),
        (
            "qwen3",
            [user("2+2?"), assistant("four", reasoning_effort="high", reasoning_tokens=5)],
            (
                "key 'reasoning_effort' of messages is not printed by the chat template",
                "key 'reasoning_tokens' of messages is not printed by the chat template",
            ),
        ),
    ],
)
def test_what_a_template_leaves_out_by_design_is_noted(name: str, messages: Messages, notes: tuple[str, ...]) -> None:
    assert sorted(Renderer(tokenizer_of("qwen", name)).chat(messages).notes) == sorted(notes)


def test_a_greeting_is_trained_where_the_template_takes_it() -> None:
    tokenizer = tokenizer_of("qwen", "qwen2_5")
    greeting = [assistant("Hello there."), *ONE]
    assert trained(tokenizer, Renderer(tokenizer).chat(greeting)) == ["Hello there.<|im_end|>", "four<|im_end|>"]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_an_answer_to_no_question_is_trained_where_the_template_takes_it(name: str) -> None:
    tokenizer = tokenizer_of("qwen", name)
    assert trained(tokenizer, Renderer(tokenizer).chat([assistant("Hello there.")])) == ["Hello there.<|im_end|>"]


def test_the_same_words_in_another_turn_do_not_hide_a_lost_text() -> None:
    """The thought is the answer itself, and the template leaves it out."""
    tokenizer = tokenizer_of("qwen", "qwen2_5")
    with pytest.raises(UserError, match="in 'reasoning_content'"):
        Renderer(tokenizer).chat([user("four?"), assistant("four", reasoning_content="four"), user("four"), assistant("four")])


def test_a_template_that_reads_parts_only_gets_parts() -> None:
    parts = families.CHATML.replace("message.content +", "message.content[0].text +")
    rendered = Renderer(families.chatml(parts)).chat(TWO)
    assert rendered == Renderer(families.chatml()).chat(TWO)


def test_variables_of_a_row_reach_the_template_in_training_and_in_the_prompt() -> None:
    tokenizer = tokenizer_of("qwen", "qwen3")
    renderer, off = Renderer(tokenizer), {"enable_thinking": False}
    (rendered,) = renderer.chats([ChatInput(ONE, template_kwargs=off)])
    assert isinstance(rendered, Rendered)
    prompt = renderer.prompt(ONE[:1], None, off)
    assert str(tokenizer.decode(prompt)).endswith(NO_THOUGHT) and rendered.input_ids[: len(prompt)] == prompt
    assert trained(tokenizer, rendered) == ["four<|im_end|>"]
    (unknown,) = renderer.chats([ChatInput(ONE, template_kwargs='{"mood": "glad"}')])
    assert isinstance(unknown, Rendered) and unknown.notes == ("the variable 'mood' of the row is not used by the chat template",)


def test_a_thought_under_another_name_is_answered_with_the_name_that_the_template_prints() -> None:
    for name, fix in (("qwen3", "give the key 'cot' the name 'reasoning_content', remove it"), ("qwen2_5", "remove it from the data")):
        with pytest.raises(UserError) as caught:
            Renderer(tokenizer_of("qwen", name)).chat([user("2+2?"), assistant("four", cot="Add them.")])
        assert str(caught.value.fix).startswith(fix)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (TWO, ["\n<think></think>\nfour<|user|>", "\n<think></think>\nyes<|user|>"]),
        (THOUGHTS, ["\n<think></think>\nfour<|user|>", "\n<think>so it is</think>\nyes<|user|>"]),
        (TOOLS, ["\n<think></think>\n<tool_call>look_up", "\n<think></think>\nsunny<|user|>"]),
    ],
)
def test_glm_4_5_with_an_end_is_trained_as_by_its_template_with_marks(messages: Messages, expected: list[str]) -> None:
    found, tools = [], [TOOL] if messages is TOOLS else None
    for name in ("glm4moe", "glm4moe_training"):
        tokenizer = tokenizer_of("glm", name)
        add_end(tokenizer)
        rendered = Renderer(tokenizer).chat(messages, tools)
        found.append((rendered.input_ids, rendered.loss_mask))
        assert all(text.startswith(start) for text, start in zip(trained(tokenizer, rendered), expected, strict=True))
    assert found[0] == found[1]


# After Command R7B: the end of a response, and behind it the end-of-text token, at which generation stops.
ENDS_TWICE = (
    "{% for m in messages %}<|START_OF_TURN_TOKEN|>"
    "{% if m.role == 'assistant' %}<|CHATBOT_TOKEN|>{{ m.content }}<|END_RESPONSE|>{% else %}<|USER_TOKEN|>{{ m.content }}{% endif %}"
    "<|END_OF_TURN_TOKEN|>{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
ENDS_CHAT = ENDS_TWICE.replace(
    "<|END_OF_TURN_TOKEN|>{% endfor %}", "{% endfor %}{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
)


@pytest.mark.parametrize("are_special", [True, False])
def test_the_end_of_text_behind_the_end_of_an_answer_is_trained_and_stops_generation(are_special: bool) -> None:
    special, _, names = FAMILIES["cohere"]
    kept, added = (special, ()) if are_special else (special[:-2], tuple(special[-2:]))
    tokenizer = families.byte_level(ENDS_TWICE, kept, added, **names)
    renderer = Renderer(tokenizer)
    assert trained(tokenizer, renderer.chat(TWO)) == [f"four{COHERE_END}", f"yes{COHERE_END}"]
    assert renderer.stop_ids == [tokenizer.eos_token_id]
    assert str(tokenizer.decode(renderer.turn_after(user("sure?")))).startswith("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>sure?")


def test_a_token_that_ends_the_chat_alone_is_no_end_of_an_answer() -> None:
    special, _, names = FAMILIES["cohere"]
    tokenizer = families.byte_level(ENDS_CHAT, special, (), **names)
    renderer = Renderer(tokenizer)
    assert trained(tokenizer, renderer.chat(TWO)) == ["four<|END_RESPONSE|>", "yes<|END_RESPONSE|>"]
    assert tokenizer.convert_ids_to_tokens(renderer.stop_ids) == ["<|END_RESPONSE|>"]


# After Qwen3-Thinking-2507: the prompt begins the thought, and only the last turn is written with an empty one.
BEGINS_THOUGHT = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- set parts = m.content.split('</think>') %}{%- set thought = parts[0].split('<think>')[-1].strip('\\n') if parts[1:] else '' %}"
    "{%- if m.role == 'assistant' and (loop.last or thought) %}"
    "{{- '<think>\\n' + thought + '\\n</think>\\n\\n' + parts[-1].lstrip('\\n') }}{%- else %}{{- parts[-1].lstrip('\\n') }}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
)


@pytest.mark.parametrize("before", [[], ONE])
@pytest.mark.parametrize("turns", [[assistant("four"), assistant("yes")], [assistant("four"), thinking("add", "yes")]])
def test_a_turn_that_another_one_follows_at_once_is_refused_if_it_is_written_otherwise_then(before: Messages, turns: Messages) -> None:
    special, added, names = FAMILIES["qwen"]
    with pytest.raises(UserError) as caught:
        Renderer(families.byte_level(BEGINS_THOUGHT, special, added, **names)).chat([*before, user("2+2?"), *turns])
    assert "writes an assistant's turn otherwise if another one follows" in caught.value.what
    assert caught.value.where == f"messages[{len(before) + 2}]" and "join the two messages" in (caught.value.fix or "")


def test_turns_in_a_row_have_the_tokens_of_the_template_where_it_writes_both_alike() -> None:
    special, added, names = FAMILIES["qwen"]
    tokenizer = families.byte_level(BEGINS_THOUGHT, special, added, **names)
    messages = [user("2+2?"), thinking("add", "four"), assistant("yes")]
    rendered = Renderer(tokenizer).chat(messages)
    assert tokenizer.decode(rendered.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert trained(tokenizer, rendered) == ["add\n</think>\n\nfour<|im_end|>", "\n</think>\n\nyes<|im_end|>"]


def plain_template(messages: Messages) -> UserError:
    """The error under a template that prints contents alone."""
    special, added, names = FAMILIES["qwen"]
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    with pytest.raises(UserError) as caught:
        Renderer(families.byte_level(template, special, added, **names)).chat(messages)
    return caught.value


@pytest.mark.parametrize("train_first", [True, False])
def test_calls_that_the_template_does_not_print_ask_for_another_template(train_first: bool) -> None:
    messages = [user("weather?"), assistant("I look.", tool_calls=[CALL], weight=int(train_first)), *TOOLS[2:]]
    error = plain_template(messages)
    assert error.where == "messages[1]" and "the template does not print calls; set data.chat_template to one" in (error.fix or "")


def test_a_thought_among_the_parts_of_a_content_is_named_as_such() -> None:
    parts = [{"type": "thinking", "thinking": "Add."}, {"type": "text", "text": "four"}]
    error = plain_template([user("2+2?"), {"role": "assistant", "content": parts}])
    assert "in 'reasoning_content', where parts of a content of type 'thinking' or 'reasoning' are" in error.what
