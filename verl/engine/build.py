"""From a model's name and settings to an engine that trains it and can write it out again."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from verl import dist
from verl.config.shared import ModelConfig, OptimConfig
from verl.engine.decisions import Decisions
from verl.engine.engine import Engine
from verl.engine.layers import Compiler, recompute_activations
from verl.engine.outline import Outline
from verl.engine.scorers import Scorer, TokenScorer, check_parts, check_scorer
from verl.engine.weights import MasterWeights
from verl.models.attention.packed import describe_attention, use_attention
from verl.models.load import Loaded, check_vocabulary, is_quantized, load_for_training, numel, read_adapter_config
from verl.models.prompt_format import PromptFormat
from verl.models.saved import export_adapter, export_model, export_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Built:
    """An engine and what it takes to write its model as a Hugging Face directory."""

    engine: Engine
    decisions: Decisions
    compiler: Compiler
    loaded: Loaded
    adapted: "PeftModel | None"
    tokenizer: PreTrainedTokenizerBase
    stop_ids: list[int]
    system_prompts: list[str | None] | None  # of the chats that it is trained on; None: each has its own
    warning: str | None  # of stop tokens with an embedding that was never trained, and that the adapter does not train

    def export(self, directory: Path) -> None:
        """Write the Hugging Face files, of the adapter alone where there is one. Every rank calls it."""
        with self.engine.weights.in_model():
            if self.adapted is None:
                export_model(directory, self.loaded.model, self.loaded.saved_dtypes)
            else:
                export_adapter(directory, self.adapted)
        export_tokenizer(directory, self.tokenizer, getattr(self.loaded.model, "generation_config", None), self.stop_ids)
        if dist.is_main():
            PromptFormat.of(self.tokenizer, self.stop_ids, self.system_prompts).write(directory)

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The whole model's tensors by its own names, adapters merged, one after another. Every rank calls it.

        Raises:
            UserError: an adapter of a kind that is not merged one tensor at a time.
        """
        if self.adapted is None:
            return whole_tensors(self.loaded.model)
        from verl.models.adapters.merged import merged_tensors

        return merged_tensors(self.adapted)

    @property
    def is_whole(self) -> bool:
        """Whether each process has all of the weights."""
        return isinstance(self.engine.weights, MasterWeights)

    def describe(self) -> str:
        """Device, attention path and size, for the first lines of a run."""
        engine, decisions = self.engine, self.decisions
        attention = describe_attention(decisions.attention, engine.device.type, engine.compute_dtype)
        trained, everything = sum(p.numel() for p in engine.trained), sum(numel(p) for p in engine.scorer.parameters())
        return (
            f"device: {dist.describe_device(engine.device)}; attention: {attention}\n"
            f"model: {type(self.loaded.model).__name__}, {everything:,} parameters, {trained:,} trained, "
            f"weights in {_name(engine.trained[0].dtype)} {engine.weights.place}, arithmetic in {_name(engine.compute_dtype)}, "
            f"layers {'compiled' if decisions.compiled else 'not compiled'} ({decisions.why_compiled})"
            + (f"\nwarning: {self.warning}" if self.warning else "")
        )


def whole_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters by name, a shared one once, gathered from all ranks where they are sharded."""
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_context(outline: Outline) -> None:
    """Raises UserError if the model's heads cannot be shared out as asked for; its weights are not read."""
    if outline.settings.context_parallel_size > 1:
        from verl.models.attention.ulysses import check_heads

        check_heads(outline.config, outline.heads, outline.settings.context_parallel_size)


def build(
    settings: ModelConfig,
    optim: OptimConfig,
    tokenizer: PreTrainedTokenizerBase,
    decisions: Decisions,
    *,
    stop_ids: list[int],
    system_prompts: list[str | None] | None = None,
    seed: int,
    dropout: bool = True,
) -> Built:
    """Load the model, check that packed batches give its own log-probabilities, add adapters where asked for, and shard it.

    Args:
        decisions: result of `decide` for this model.
        stop_ids: token ids that end a trained answer; generation from the written model stops at them.
        system_prompts: of the chats, None for those that leave it to the template; they are written down beside the weights.
        seed: of the adapters' first values and of dropout.
        dropout: whether adapters drop the share that their settings say.
    Raises:
        UserError: no such model, or one that cannot be trained this way.
    """
    prepare_process(decisions, seed)
    loaded, scorer = _load(settings, decisions)
    check_vocabulary(loaded.model, tokenizer, settings.partial_pretrain)
    adapted, warning = None, None
    if _has_adapters(settings):
        from verl.models.adapters.lora import add_adapters
        from verl.models.adapters.trained_tokens import stop_token_warning, untrained_stop_tokens

        untrained = untrained_stop_tokens(loaded.output_embeddings(), tokenizer, stop_ids)
        warning = stop_token_warning(untrained) if untrained and settings.trainable_tokens is None else None
        adapted = add_adapters(
            loaded.model,
            settings,
            compute_dtype=decisions.compute_dtype,
            seed=seed,
            tokenizer=tokenizer,
            stop_ids=stop_ids,
            dropout=dropout,
        )
        _use_operators(adapted, loaded.model, decisions)
    compiler = prepare_layers(loaded.model, decisions, liger=settings.use_liger)
    engine = make_engine(scorer, optim, loaded, decisions)
    return Built(engine, decisions, compiler, loaded, adapted, tokenizer, stop_ids, system_prompts, warning)


def prepare_process(decisions: Decisions, seed: int) -> None:
    """Seed the random numbers, and activate the attention kernel that all models of the process use."""
    torch.manual_seed(seed)
    use_attention(decisions.attention)


def make_engine(scorer: Scorer, optim: OptimConfig | None, loaded: Loaded, decisions: Decisions) -> Engine:
    return Engine(
        scorer,
        optim,
        total_steps=decisions.workload.total_steps,
        device=decisions.device,
        compute_dtype=decisions.compute_dtype,
        spread=decisions.spread,
        fill=loaded.fill,
        graph_tokens=decisions.graph_tokens,
    )


def prepare_layers(model: PreTrainedModel, decisions: Decisions, *, liger: bool = False) -> Compiler:
    """Apply Liger's kernels, activation checkpointing and compiling to the layers, in place."""
    if liger:
        from verl.models.liger import use_liger

        use_liger(model, decisions.device)
    if decisions.checkpointing != "none":
        recompute_activations(model, selective=decisions.checkpointing == "selective")
    return Compiler(decisions.compiled, model)


def _use_operators(adapted: "PeftModel", model: PreTrainedModel, decisions: Decisions) -> None:
    from verl.models.adapters.operators import use_operators

    use_operators(adapted, checkpointed=decisions.checkpointing != "none")
    model.enable_input_require_grads()  # or the first layer, whose input needs none, would be compiled apart


def loading_device(decisions: Decisions) -> torch.device:
    """The device that weights are loaded to."""
    return torch.device("cpu") if decisions.spread.sharding.cpu_offload else decisions.device


def _load(settings: ModelConfig, decisions: Decisions) -> tuple[Loaded, TokenScorer]:
    """The model, in the dtype that the optimizer updates. Where it is to be sharded it has no values yet (`Loaded.fill`)."""
    source, trusted, adapters = settings.partial_pretrain, settings.trust_remote_code, _has_adapters(settings)
    device, home, compute_dtype = decisions.device, loading_device(decisions), decisions.compute_dtype
    if decisions.is_sharded and not _starts_from_values(settings):
        from verl.models.shards import load_without_values, small_twin

        frozen = compute_dtype if adapters else decisions.param_dtype
        loaded = load_without_values(source, dtype=frozen, trust_remote_code=trusted)
        if loaded is not None:
            _check(TokenScorer(small_twin(loaded.model, device)))
            return loaded, TokenScorer(loaded.model)
    if adapters and compute_dtype != torch.float32 and not (settings.use_dora or settings.load_in_4bit):
        from verl.models.shards import small_twin

        # What is frozen needs no float32; DoRA starts from the norms of its rows, which do.
        loaded = load_for_training(source, device=home, dtype=compute_dtype, trust_remote_code=trusted)
        _check(TokenScorer(small_twin(loaded.model, device)))
        return loaded, TokenScorer(loaded.model)
    if settings.load_in_4bit:
        from verl.models.quantize import load_in_4bit

        loaded = load_in_4bit(settings, device=home, compute_dtype=compute_dtype)
    else:
        loaded = load_for_training(source, device=home, trust_remote_code=trusted)
    scorer = TokenScorer(loaded.model)
    _check(scorer)
    cast_weights(loaded.model, decisions.param_dtype)
    return loaded, scorer


def _has_adapters(settings: ModelConfig) -> bool:
    return settings.lora_rank > 0 or settings.lora_adapter_path is not None


def _starts_from_values(settings: ModelConfig) -> bool:
    """Whether adapters need the weights that they lie beside: their norms, their rounded blocks, or some of their rows."""
    goes_on = {} if settings.lora_adapter_path is None else read_adapter_config(settings.lora_adapter_path) or {}
    asked = settings.use_dora or settings.load_in_4bit or settings.trainable_tokens is not None
    return bool(asked or goes_on.get("use_dora") or goes_on.get("trainable_token_indices"))


def _check(scorer: TokenScorer) -> None:
    """Whether the architecture can be trained in packed batches, and where processes share them, in parts of one."""
    check_scorer(scorer)
    check_parts(scorer)


def cast_weights(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Weights to the dtype that the optimizer updates, one at a time; buffers, such as rotary frequencies, stay as they are.

    Not earlier: packed batches are compared with the model alone in float32, where a difference of 1e-3 means something.
    """
    for parameter in model.parameters():
        if not is_quantized(parameter):
            parameter.data = parameter.data.to(dtype)
