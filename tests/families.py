"""Small tokenizers with chat templates in the manner of well-known families of models, made without files."""

import functools
import json
from string import printable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXT = [
    "the cat sat on the mat and the dog sat on the log",
    "What is 12 + 30? The answer is 42.\n\n#### 42",
    "Yes, it is. Is the sky blue?",
] * 4

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_WITH_MARKS = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}{{ '<|im_end|>\\n' }}"
    "{% else %}{{ message.content + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_WITHOUT_PROMPT = CHATML.partition("{% if add_generation_prompt %}")[0]
# Thinking is kept in the last answer only, and an answer without any begins with an empty block.
QWEN3 = (
    "{%- set last = namespace(question=-1) %}"
    "{%- for message in messages %}{%- if message.role == 'user' %}{%- set last.question = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}"
    "{%- set content = message.content or '' %}"
    "{%- if message.role == 'assistant' %}"
    "{%- set thought = '' %}"
    "{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}"
    "{%- endif %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if loop.index0 > last.question %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- content }}"
    "{%- for call in message.tool_calls or [] %}"
    "{%- set call = call.function or call %}"
    "{{- '\\n<tool_call>\\n{\"name\": \"' + call.name + '\", \"arguments\": ' }}{{- call.arguments | tojson }}{{- '}\\n</tool_call>' }}"
    "{%- endfor %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- elif message.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA3 = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles have to alternate') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}"
    "{% endfor %}"
)
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
# The answer stands in a channel, between control tokens that the prompt does not hold.
CHANNELS = (
    "{% for message in messages %}"
    "{{ '<|start|>' + message.role + ('<|channel|>final' if message.role == 'assistant' else '') }}"
    "{{ '<|message|>' + message.content + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)


@functools.cache
def _byte_level() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    return tokenizer.to_str()


@functools.cache
def _with_prefix_space() -> str:
    """A tokenizer that puts a space before its text, as those made with SentencePiece do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()])
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, initial_alphabet=list(printable), show_progress=False))
    state = json.loads(tokenizer.to_str())
    state["model"]["byte_fallback"] = True
    vocabulary = state["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    return json.dumps(state)


def byte_level(template: str | None, special: list[str | AddedToken], added: tuple[str, ...] = (), **names: str) -> PreTrainedTokenizerFast:
    return _finished(_byte_level(), template, special, added, names)


def with_prefix_space(template: str, special: list[str | AddedToken], **names: str) -> PreTrainedTokenizerFast:
    return _finished(_with_prefix_space(), template, special, (), names)


def _finished(
    state: str, template: str | None, special: list[str | AddedToken], added: tuple[str, ...], names: dict[str, str]
) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(state)
    backend.add_special_tokens(special)
    backend.add_tokens([AddedToken(token, normalized=False) for token in added])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    return tokenizer


def chatml(template: str | None = CHATML, added: tuple[str, ...] = ("<tool_call>", "</tool_call>")) -> PreTrainedTokenizerFast:
    return byte_level(template, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], added, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def qwen3() -> PreTrainedTokenizerFast:
    return chatml(QWEN3, ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"))


def llama3() -> PreTrainedTokenizerFast:
    special: list[str | AddedToken] = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"]
    return byte_level(LLAMA3, special, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


def gemma() -> PreTrainedTokenizerFast:
    special: list[str | AddedToken] = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    return byte_level(GEMMA, special, ("\n\n", "<table>"), bos_token="<bos>", eos_token="<eos>")


def mistral() -> PreTrainedTokenizerFast:
    return byte_level(MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], bos_token="<s>", eos_token="</s>")


def llama2() -> PreTrainedTokenizerFast:
    return with_prefix_space(MISTRAL, ["<s>", "</s>"], bos_token="<s>", eos_token="</s>")


def phi3() -> PreTrainedTokenizerFast:
    special = [AddedToken(token, rstrip=True, normalized=False) for token in ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")]
    return byte_level(PHI3, ["<|endoftext|>", *special], eos_token="<|endoftext|>")


def channels() -> PreTrainedTokenizerFast:
    return byte_level(CHANNELS, ["<|start|>", "<|channel|>", "<|message|>", "<|end|>"], eos_token="<|end|>")


def glm(template: str) -> PreTrainedTokenizerFast:
    special = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    return byte_level(template, [*special], eos_token="<|endoftext|>")
