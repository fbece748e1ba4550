"""A tiny Qwen2 model with random weights and a tokenizer with Qwen's chat format, so that a first run needs no network."""

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from verl.progress import quiet_libraries

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
POSITIONS = 2048
# Messages between START and END, followed by the generation prompt if requested.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@quiet_libraries()
def write_tiny_model(folder: Path, texts: Iterable[str], *, seed: int = 1) -> int:
    """Write a Hugging Face model directory: random weights, a tokenizer trained on the texts, and a generation config.

    Args:
        folder: output directory; created if missing.
        texts: training texts of the tokenizer; unknown words are encoded as bytes.
        seed: seed of the weights.
    Returns:
        the number of parameters.
    """
    tokenizer = tiny_tokenizer(texts)
    model = tiny_model(tokenizer, seed=seed)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return model.num_parameters()


def tiny_tokenizer(texts: Iterable[str], *, vocab_size: int = 1024) -> Qwen2Tokenizer:
    """Train a tokenizer like Qwen's: one token per digit, its special tokens and its chat format."""
    untrained = Qwen2Tokenizer(eos_token=END, pad_token=PAD, extra_special_tokens=[START, END], model_max_length=POSITIONS)
    tokenizer: Qwen2Tokenizer = untrained.train_new_from_iterator([*texts, "system\nuser\nassistant\n"], vocab_size, show_progress=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(tokenizer: Qwen2Tokenizer, *, seed: int = 1) -> Qwen2ForCausalLM:
    """Build a Qwen2 model of about 1.5 million parameters, in float32."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.06,  # near 1 / sqrt(192), because such a narrow model learns far more slowly with the usual 0.02
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id], pad_token_id=tokenizer.pad_token_id
    )
    return model
