"""From a model's name and settings to an engine that trains it and can write it out again."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from verl import dist
from verl.config import ModelConfig, OptimConfig
from verl.engine.compile import Compiler
from verl.engine.engine import Engine
from verl.engine.logprobs import TokenScorer, check_scorer
from verl.engine.recompute import recompute_activations
from verl.models import flash
from verl.models.attention import choose_attention, describe_attention, heads_of
from verl.models.export import export_adapter, export_model, export_tokenizer
from verl.models.load import Loaded, check_vocabulary, load_for_training
from verl.models.quantize import four_bit, is_quantized, numel
from verl.models.trained_tokens import stop_token_warning, untrained_stop_tokens

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Built:
    """An engine and what it takes to write its model as a Hugging Face directory."""

    engine: Engine
    compiler: Compiler
    loaded: Loaded
    adapted: "PeftModel | None"
    tokenizer: PreTrainedTokenizerBase
    stop_ids: list[int]
    never_trained: list[str]  # stop tokens whose embedding an adapter leaves as no text ever trained it

    def export(self, directory: Path) -> None:
        """Write the Hugging Face files, of the adapter alone where there is one. Every rank calls it."""
        with self.engine.weights.in_model():
            if self.adapted is None:
                export_model(directory, self.loaded.model, self.loaded.saved_dtypes)
            else:
                export_adapter(directory, self.adapted)
        export_tokenizer(directory, self.tokenizer, self.loaded.model.generation_config, self.stop_ids)

    def describe(self) -> str:
        """Device, attention path and size, for the first lines of a run."""
        engine = self.engine
        trained, everything = sum(p.numel() for p in engine.trained), sum(numel(p) for p in engine.scorer.parameters())
        return (
            f"device: {dist.describe_device(engine.device)}; attention: {describe_attention(engine.device.type, engine.compute_dtype)}\n"
            f"model: {type(self.loaded.model).__name__}, {everything:,} parameters, {trained:,} trained, "
            f"weights in {_name(engine.trained[0].dtype)}, arithmetic in {_name(engine.compute_dtype)}, "
            f"layers {'compiled' if self.compiler.on else 'not compiled'} ({self.compiler.why})"
            + (f"\nwarning: {stop_token_warning(self.never_trained)}" if self.never_trained else "")
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def build(
    settings: ModelConfig,
    optim: OptimConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_ids: list[int],
    total_steps: int,
    total_tokens: int,
    documents: flash.Documents,
    device: torch.device,
    seed: int,
) -> Built:
    """Load the model, check that packed batches give its own log-probabilities, add adapters where asked for, and shard it.

    Args:
        stop_ids: token ids that end a trained answer; generation from the written model stops at them.
        total_steps: optimizer steps of the whole run.
        total_tokens: about as many as the whole run sees, over all processes.
        documents: of the run, by which attention is chosen.
        seed: of the adapters' first values and of dropout.
    Raises:
        UserError: no such model, or one that cannot be trained this way.
    """
    torch.manual_seed(seed)
    offload = settings.fsdp_config.cpu_offload
    home = torch.device("cpu") if offload else device
    compute_dtype = _compute_dtype(settings.compute_dtype, device)
    loaded = load_for_training(
        settings.partial_pretrain,
        device=home,
        trust_remote_code=settings.trust_remote_code,
        quantization=four_bit(settings, compute_dtype),
    )
    check_vocabulary(loaded.model, tokenizer, settings.partial_pretrain)
    scorer = TokenScorer(loaded.model)
    check_scorer(scorer)
    _cast(loaded.model, getattr(torch, settings.param_dtype))
    choose_attention(settings.attn_implementation, device, compute_dtype, heads_of(loaded.model.config), documents)
    adapted, never_trained = None, list[str]()
    if settings.lora_rank > 0 or settings.lora_adapter_path is not None:
        from verl.models.adapted import use_operators
        from verl.models.lora import add_adapters

        never_trained = untrained_stop_tokens(loaded.model, tokenizer, stop_ids)
        adapted = add_adapters(loaded.model, settings, compute_dtype=compute_dtype, seed=seed, tokenizer=tokenizer, stop_ids=stop_ids)
        use_operators(adapted)
        loaded.model.enable_input_require_grads()  # or the first layer, whose input needs none, would be compiled apart
    if settings.use_liger:
        from verl.models.liger import use_liger

        use_liger(loaded.model, device)
    if settings.enable_gradient_checkpointing:
        recompute_activations(loaded.model, selective=settings.enable_gradient_checkpointing == "selective")
    compiler = Compiler(settings.compile, loaded.model, device, total_tokens // dist.world_size())
    engine = Engine(scorer, optim, total_steps=total_steps, device=device, compute_dtype=compute_dtype, cpu_offload=offload)
    return Built(engine, compiler, loaded, adapted, tokenizer, stop_ids, never_trained if settings.trainable_tokens is None else [])


def _cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Weights to the dtype that the optimizer updates, one at a time; buffers, such as rotary frequencies, stay as they are.

    Not earlier: packed batches are compared with the model alone in float32, where a difference of 1e-3 means something.
    """
    for parameter in model.parameters():
        if not is_quantized(parameter):
            parameter.data = parameter.data.to(dtype)


def _compute_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype
