"""Build an engine from a model's name and settings: load the model, check it, add adapters, and shard it."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from verl import dist
from verl.config.shared import ModelConfig, OptimConfig
from verl.engine.decisions import Decisions
from verl.engine.engine import Engine
from verl.engine.layers import Compiler, recompute_activations, require_input_gradient
from verl.engine.outline import Outline
from verl.engine.scorers import Scorer, TokenScorer
from verl.engine.weights import MasterWeights
from verl.models.attention.packed import ForwardPath, use_attention
from verl.models.load import Loaded, check_vocabulary, is_quantized, load_for_training, read_adapter_config
from verl.models.prompt_format import PromptFormat

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Built:
    """A built engine, with everything needed to save its model as a Hugging Face directory.

    Attributes:
        adapted: the model with its adapters; None without adapters.
        stop_ids: token ids that end a trained response.
        system_prompts: system prompts of the training chats, with None for a chat without one; None if each chat has its own.
        notes: further lines for the log: about stop tokens that are never trained, and about a router's loss.
    """

    engine: Engine
    decisions: Decisions
    compiler: Compiler
    loaded: Loaded
    adapted: "PeftModel | None"
    tokenizer: PreTrainedTokenizerBase
    stop_ids: list[int]
    system_prompts: list[str | None] | None
    notes: list[str]

    def export(self, directory: Path) -> None:
        """Write the Hugging Face files: only the adapter if there is one, else the whole model. Every rank calls it."""
        from verl.models import saved  # once a checkpoint

        with self.engine.weights.in_model():
            if self.adapted is None:
                saved.export_model(directory, self.loaded.model, self.loaded.saved_dtypes)
            else:
                saved.export_adapter(directory, self.adapted)
        self._write_beside(directory)

    def gathered(self, copies: dict[str, torch.Tensor]) -> Callable[[Path], None]:
        """Prepare `export`, and return the part of it that writes. Every rank calls it; what it returns waits for no other rank.

        Args:
            copies: copies of the trained parameters in host memory, by the engine's names; a sharded one is gathered instead.
        """
        from verl.models import saved  # once a checkpoint

        trained = self.engine.weights.trained
        of_id = {id(trained[name]): copy for name, copy in copies.items()}
        dtypes = {} if self.adapted is not None else self.loaded.saved_dtypes
        with self.engine.weights.in_model():
            weights = saved.gather(self.adapted or self.loaded.model, dtypes, only_trained=self.adapted is not None, copies=of_id)
        return partial(self._write, weights=weights, beside=self._files_beside)

    @cached_property
    def _files_beside(self) -> dict[str, bytes]:
        """Contents of the files beside the weights. They are the same in each checkpoint, and writing a tokenizer takes a while."""
        with tempfile.TemporaryDirectory() as folder:
            self._write_beside(Path(folder))
            return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

    def _write(self, directory: Path, *, weights: dict[str, torch.Tensor], beside: dict[str, bytes]) -> None:
        from verl.models import saved  # once a checkpoint

        if self.adapted is None:
            dtypes = self.loaded.saved_dtypes
            saved.write_model(directory, self.loaded.model, saved.cast(weights, dtypes), dtypes)
        else:
            saved.write_adapter(directory, self.adapted, weights)
        for name, content in beside.items():
            (directory / name).write_bytes(content)

    def _write_beside(self, directory: Path) -> None:
        from verl.models import saved  # once a checkpoint

        saved.export_tokenizer(directory, self.tokenizer, getattr(self.loaded.model, "generation_config", None), self.stop_ids)
        if dist.is_main():
            PromptFormat.of(self.tokenizer, self.stop_ids, self.system_prompts).write(directory)

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the name and full tensor of each parameter of the model, with adapters merged. Every rank calls it.

        Raises:
            UserError: the adapters cannot be merged one tensor at a time.
        """
        if self.adapted is None:
            return whole_tensors(self.loaded.model)
        from verl.models.adapters.merged import merged_tensors

        return merged_tensors(self.adapted)

    def _note(self) -> str:
        """Return a line about weights without adapters, or about what is saved as it was; "" if there is nothing to say."""
        if self.adapted is not None:
            return str(getattr(self.adapted, "left_out", ""))
        return str(getattr(self.loaded.saved_dtypes, "describe", str)())

    @property
    def is_whole(self) -> bool:
        """Return whether each process has all the weights."""
        return isinstance(self.engine.weights, MasterWeights)

    def describe(self) -> str:
        """Describe the device, attention kernel, model size and dtypes, for the first lines of a run."""
        from verl.engine.description import describe  # once in a run

        notes = [note, *self.notes] if (note := self._note()) else self.notes
        return "\n".join([*describe(self.engine, self.decisions, self.loaded.model), *notes])


def whole_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and value of each parameter. Sharded parameters are gathered from all ranks; a tied parameter is yielded once."""
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_context(outline: Outline) -> None:
    """Raise UserError if context_parallel_size does not divide the number of attention heads. Only the model's config is read."""
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
    """Load the model, check its log-probabilities on packed batches, add adapters if the settings have any, and shard it.

    Args:
        decisions: result of `decide` for this model.
        stop_ids: token ids that end a trained response; generation with the saved model stops at them.
        system_prompts: system prompts of the training chats, with None for a chat without one; saved next to the weights.
        seed: seed of the adapters' initial values and of dropout.
        dropout: whether to apply `lora_dropout`.
    Raises:
        UserError: no such model, or it cannot be trained with these settings.
    """
    from verl.engine.router_loss import find_router_loss  # once in a run

    prepare_process(decisions, seed)
    loaded, scorer = _load(settings, decisions)
    check_vocabulary(loaded.model, tokenizer, settings.partial_pretrain)
    adapted, notes = None, []
    if _has_adapters(settings):
        from verl.models.adapters.lora import add_adapters
        from verl.models.adapters.trained_tokens import stop_token_warning, untrained_stop_tokens

        untrained = untrained_stop_tokens(loaded.output_embeddings(), tokenizer, stop_ids)
        notes = [f"warning: {stop_token_warning(untrained)}"] if untrained and settings.trainable_tokens is None else []
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
    engine.router_loss, more = find_router_loss(loaded.model, settings.router_aux_loss_coef)
    return Built(engine, decisions, compiler, loaded, adapted, tokenizer, stop_ids, system_prompts, [*notes, *more])


def prepare_process(decisions: Decisions, seed: int) -> None:
    """Seed PyTorch, and activate the attention kernels of this process."""
    torch.manual_seed(seed)
    use_attention(decisions.attention)
    if decisions.rule is not None:
        from verl.models.attention.delta_rule import use_rule

        use_rule(decisions.rule)


def make_engine(scorer: Scorer, optim: OptimConfig | None, loaded: Loaded, decisions: Decisions) -> Engine:
    """Build an engine from the decisions. Without `optim`, the model is frozen."""
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
    """Apply Liger's kernels, activation checkpointing and torch.compile to the decoder layers in place."""
    if liger:
        from verl.models.liger import use_liger

        use_liger(model, decisions.device)
    if decisions.checkpointing != "none":
        recompute_activations(model, selective=decisions.checkpointing == "selective")
    return Compiler(decisions.compiled, model)


def _use_operators(adapted: "PeftModel", model: PreTrainedModel, decisions: Decisions) -> None:
    from verl.models.adapters.operators import use_operators

    use_operators(adapted, checkpointed=decisions.checkpointing != "none")
    # Frozen embeddings have no gradient, so the first layer's input would not require one, and that layer would be compiled separately.
    require_input_gradient(model)


def loading_device(decisions: Decisions) -> torch.device:
    """Return the device that the weights are loaded to: the CPU if they are offloaded."""
    return torch.device("cpu") if decisions.spread.sharding.cpu_offload else decisions.device


def _load(settings: ModelConfig, decisions: Decisions) -> tuple[Loaded, TokenScorer]:
    """Load the model in the dtype that the optimizer updates. A model that will be sharded stays on the meta device (`Loaded.fill`)."""
    source, trusted, adapters = settings.partial_pretrain, settings.trust_remote_code, _has_adapters(settings)
    device, home, compute_dtype = decisions.device, loading_device(decisions), decisions.compute_dtype
    path, attention = decisions.path, decisions.path.attention
    if decisions.is_sharded and not _needs_base_weights(settings):
        from verl.models.shards import load_without_values

        frozen = compute_dtype if adapters else decisions.param_dtype
        loaded = load_without_values(source, dtype=frozen, trust_remote_code=trusted, attention=attention)
        if loaded is not None:
            _check_twin(loaded, device, path)
            return loaded, TokenScorer(loaded.model, path=path)
    if adapters and compute_dtype != torch.float32 and not (settings.use_dora or settings.load_in_4bit):
        # Frozen weights do not need float32. DoRA does, because it starts from the norms of the weight rows.
        loaded = load_for_training(source, device=home, dtype=compute_dtype, trust_remote_code=trusted, attention=attention)
        _check_twin(loaded, device, path)
        return loaded, TokenScorer(loaded.model, path=path)
    if settings.load_in_4bit:
        from verl.models.quantize import load_in_4bit

        loaded = load_in_4bit(settings, device=home, compute_dtype=compute_dtype, attention=attention)
    else:
        loaded = load_for_training(source, device=home, trust_remote_code=trusted, attention=attention)
    scorer = TokenScorer(loaded.model, path=path)
    _check(scorer)
    cast_weights(loaded.model, decisions.param_dtype)
    return loaded, scorer


def _has_adapters(settings: ModelConfig) -> bool:
    return settings.lora_rank > 0 or settings.lora_adapter_path is not None


def _needs_base_weights(settings: ModelConfig) -> bool:
    """Return whether the adapters are computed from the base weights, as with DoRA, 4-bit weights and trainable tokens."""
    existing = {} if settings.lora_adapter_path is None else read_adapter_config(settings.lora_adapter_path) or {}
    requested = settings.use_dora or settings.load_in_4bit or settings.trainable_tokens is not None
    return bool(requested or existing.get("use_dora") or existing.get("trainable_token_indices"))


def _check_twin(loaded: Loaded, device: torch.device, path: ForwardPath) -> None:
    if path.packed:  # the model's own code needs no twin
        from verl.models.shards import small_twin

        _check(TokenScorer(small_twin(loaded.model, device)))


def _check(scorer: TokenScorer) -> None:
    """Raise UserError if the architecture cannot be trained on packed batches or, with context parallelism, on slices of them."""
    from verl.engine.trial import check_parts, check_scorer  # once a run

    check_scorer(scorer)
    check_parts(scorer)


def cast_weights(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters to the dtype that the optimizer updates, one at a time. Buffers, such as rotary frequencies, are not cast.

    Call this after `check_scorer`: it compares log-probabilities to 1e-3, which is meaningful only in float32.
    """
    for parameter in model.parameters():
        if not is_quantized(parameter):
            parameter.data = parameter.data.to(dtype)
