"""The tokenizer of a twin: a token for each byte, and the control tokens of a chat format."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD = 256  # the first id behind the bytes: padding, then the start and the end of a message
VOCABULARY = 272  # rows of a twin's embeddings: transformers gives the tokenizers of some families tokens of their own
SPECIAL = ("<|pad|>", "<|start|>", "<|end|>")
# The marks say to transformers which text the assistant has written, so that its own mask is the reference of verl's.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|start|>' ~ message.role ~ '\\n' }}"
    "{%- if message.role == 'assistant' %}{% generation %}{{ message.content ~ '<|end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{%- else %}{{- message.content ~ '<|end|>\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant\\n' }}{%- endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of 256 bytes and three control tokens, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=SPECIAL[0], eos_token=SPECIAL[2], model_max_length=4096)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
