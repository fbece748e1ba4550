"""From a model's name and settings to an engine that trains it and can write it out again."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, PreTrainedTokenizerBase

from verl import dist
from verl.config.shared import ModelConfig, OptimConfig
from verl.data.batch import Batch
from verl.engine.compile import Compiler
from verl.engine.engine import Engine
from verl.engine.fsdp import Sharding
from verl.engine.recompute import recompute_activations
from verl.engine.scorers import RewardScorer, TokenScorer, ValueScorer, check_hidden, check_parts, check_scorer
from verl.engine.weights import MasterWeights, Spread
from verl.errors import UserError
from verl.models.adapters.trained_tokens import stop_token_warning, untrained_stop_tokens
from verl.models.attention import flash
from verl.models.attention.packed import choose_attention, describe_attention, has_flash, heads_of
from verl.models.attention.ulysses import check_heads, heads_of_each
from verl.models.heads import load_critic, load_reward_model
from verl.models.load import (
    Loaded,
    check_vocabulary,
    count_parameters,
    load_for_training,
    load_tokenizer,
    read_adapter_config,
    resolve,
)
from verl.models.prompt_format import PromptFormat
from verl.models.quantize import four_bit, is_quantized, numel
from verl.models.saved import export_adapter, export_model, export_tokenizer
from verl.models.shards import load_without_values, small_twin

if TYPE_CHECKING:
    from peft import PeftModel


# model.strategy=auto: bytes of a parameter with working copy, gradient and moments, or frozen, and how much of a GPU is little.
BYTES_TRAINED, BYTES_FROZEN, SMALL_SHARE = 18, 2, 0.25
# Of a parameter in host memory: weight, gradient and two moments in float32, and what pinning weight and gradient may add.
BYTES_OFFLOADED, BYTES_PINNED = 16, 8


@dataclass(frozen=True)
class Built:
    """An engine and what it takes to write its model as a Hugging Face directory."""

    engine: Engine
    compiler: Compiler
    loaded: Loaded
    adapted: "PeftModel | None"
    tokenizer: PreTrainedTokenizerBase
    stop_ids: list[int]
    system_prompts: list[str | None] | None  # of the chats that it is trained on; None: each has its own
    never_trained: list[str]  # stop tokens whose embedding an adapter leaves as no text ever trained it

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
        engine = self.engine
        trained, everything = sum(p.numel() for p in engine.trained), sum(numel(p) for p in engine.scorer.parameters())
        return (
            f"device: {dist.describe_device(engine.device)}; attention: {describe_attention(engine.device.type, engine.compute_dtype)}\n"
            f"model: {type(self.loaded.model).__name__}, {everything:,} parameters, {trained:,} trained, "
            f"weights in {_name(engine.trained[0].dtype)} {engine.weights.place}, arithmetic in {_name(engine.compute_dtype)}, "
            f"layers {'compiled' if self.compiler.on else 'not compiled'} ({self.compiler.why})"
            + (f"\nwarning: {stop_token_warning(self.never_trained)}" if self.never_trained else "")
        )


@dataclass(frozen=True)
class Critic:
    """An engine with a value head, and what it takes to write it as a Hugging Face directory."""

    engine: Engine
    loaded: Loaded

    def export(self, directory: Path) -> None:
        """Write a token classification model with one label. Every rank calls it."""
        directory.mkdir(exist_ok=True)
        with self.engine.weights.in_model():
            export_model(directory, self.loaded.model, self.loaded.saved_dtypes)


def whole_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters by name, a shared one once, gathered from all ranks where they are sharded."""
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_context(settings: ModelConfig) -> None:
    """Raises UserError if the model's heads cannot be shared out as asked for; its weights are not read."""
    if settings.context_parallel_size == 1:
        return
    try:
        config = AutoConfig.from_pretrained(resolve(settings.partial_pretrain), trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, KeyError):
        return  # loading the model says what is wrong with it
    check_heads(config, heads_of(config), settings.context_parallel_size)


def build(
    settings: ModelConfig,
    optim: OptimConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_ids: list[int],
    system_prompts: list[str | None] | None = None,
    total_steps: int,
    total_tokens: int,
    documents: flash.Documents,
    device: torch.device,
    seed: int,
    dropout: bool = True,
) -> Built:
    """Load the model, check that packed batches give its own log-probabilities, add adapters where asked for, and shard it.

    Args:
        stop_ids: token ids that end a trained answer; generation from the written model stops at them.
        system_prompts: of the chats, None for those that leave it to the template; they are written down beside the weights.
        total_steps: optimizer steps of the whole run.
        total_tokens: about as many as the whole run sees, over all processes.
        documents: of the run, by which attention is chosen.
        seed: of the adapters' first values and of dropout.
        dropout: whether adapters drop the share that their settings say.
    Raises:
        UserError: no such model, or one that cannot be trained this way.
    """
    torch.manual_seed(seed)
    compute_dtype = _compute_dtype(settings.compute_dtype, device)
    spread = choose_spread(settings, device)
    loaded, scorer = _load(settings, spread, device, compute_dtype)
    check_vocabulary(loaded.model, tokenizer, settings.partial_pretrain)
    heads = heads_of_each(heads_of(loaded.model.config), settings.context_parallel_size)
    choose_attention(settings.attn_implementation, device, compute_dtype, heads, documents=documents)
    adapted, never_trained = None, list[str]()
    if settings.lora_rank > 0 or settings.lora_adapter_path is not None:
        from verl.models.adapters.lora import add_adapters
        from verl.models.adapters.operators import use_operators

        never_trained = untrained_stop_tokens(loaded.output_embeddings(), tokenizer, stop_ids)
        adapted = add_adapters(
            loaded.model, settings, compute_dtype=compute_dtype, seed=seed, tokenizer=tokenizer, stop_ids=stop_ids, dropout=dropout
        )
        use_operators(adapted, checkpointed=bool(settings.enable_gradient_checkpointing))
        loaded.model.enable_input_require_grads()  # or the first layer, whose input needs none, would be compiled apart
    if settings.use_liger:
        from verl.models.liger import use_liger

        use_liger(loaded.model, device)
    if settings.enable_gradient_checkpointing:
        recompute_activations(loaded.model, selective=settings.enable_gradient_checkpointing == "selective")
    compiler = Compiler(settings.compile, loaded.model, device, total_tokens // dist.world_size())
    engine = Engine(
        scorer,
        optim,
        total_steps=total_steps,
        device=device,
        compute_dtype=compute_dtype,
        spread=spread,
        fill=loaded.fill,
        captured=settings.cuda_graphs == "auto"
        and compiler.on
        and has_flash(device.type, compute_dtype)
        and settings.attn_implementation != "sdpa",
    )
    if settings.trainable_tokens is not None:
        never_trained = []
    return Built(engine, compiler, loaded, adapted, tokenizer, stop_ids, system_prompts, never_trained)


def build_critic(
    settings: ModelConfig,
    optim: OptimConfig,
    path: str,
    actor: Built,
    *,
    total_steps: int,
    total_tokens: int,
    device: torch.device,
    seed: int,
) -> Critic:
    """A model with a value head, all of it trained, spread as the actor is.

    Args:
        settings: of the actor; its adapter is not the critic's.
        path: a critic, or a causal language model that gets a head of zeros.
        total_steps, total_tokens: as for `build`.
    Raises:
        UserError: no such model, one that cannot have the head or be trained in packed batches, or one that lacks the actor's tokens.
    """
    torch.manual_seed(seed)
    spread, compute_dtype = choose_spread(settings, device), _compute_dtype(settings.compute_dtype, device)
    home = torch.device("cpu") if spread.sharding.cpu_offload else device
    values, dtype = not _will_be_sharded(spread), getattr(torch, settings.param_dtype)
    loaded = load_critic(path, device=home, trust_remote_code=settings.trust_remote_code, values=values)
    check_vocabulary(loaded.model, actor.tokenizer, path)
    check_hidden(ValueScorer(loaded.model if loaded.fill is None else small_twin(loaded.model, device)), where=path)
    _cast(loaded.model, dtype)
    if settings.enable_gradient_checkpointing:
        recompute_activations(loaded.model, selective=settings.enable_gradient_checkpointing == "selective")
    Compiler(settings.compile, loaded.model, device, total_tokens // dist.world_size())
    scorer = ValueScorer(loaded.model)
    engine = Engine(scorer, optim, total_steps=total_steps, device=device, compute_dtype=compute_dtype, spread=spread, fill=loaded.fill)
    return Critic(engine, loaded)


def build_reward_model(
    settings: ModelConfig,
    optim: OptimConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_ids: list[int],
    padding: int | None,
    total_steps: int,
    total_tokens: int,
    documents: flash.Documents,
    device: torch.device,
    seed: int,
) -> Built:
    """A model with one score for a whole document, all of it trained.

    Args:
        settings: its partial_pretrain is such a model, or a causal language model that gets a head of zeros.
        padding: id of the token that transformers' own class takes for padding; None: it reads one document at a time.
        stop_ids, total_steps, total_tokens, documents: as for `build`.
    Raises:
        UserError: no such model, or one that cannot have the head.
    """
    torch.manual_seed(seed)
    spread, compute_dtype = choose_spread(settings, device), _compute_dtype(settings.compute_dtype, device)
    home = torch.device("cpu") if spread.sharding.cpu_offload else device
    path = settings.partial_pretrain
    values = not _will_be_sharded(spread)
    loaded = load_reward_model(path, device=home, trust_remote_code=settings.trust_remote_code, values=values)
    check_vocabulary(loaded.model, tokenizer, path)
    check_hidden(RewardScorer(loaded.model if loaded.fill is None else small_twin(loaded.model, device)), where=path)
    loaded.model.config.pad_token_id = padding
    choose_attention(settings.attn_implementation, device, compute_dtype, heads_of(loaded.model.config), documents=documents)
    _cast(loaded.model, getattr(torch, settings.param_dtype))
    if settings.use_liger:
        from verl.models.liger import use_liger

        use_liger(loaded.model, device)
    if settings.enable_gradient_checkpointing:
        recompute_activations(loaded.model, selective=settings.enable_gradient_checkpointing == "selective")
    compiler = Compiler(settings.compile, loaded.model, device, total_tokens // dist.world_size())
    scorer = RewardScorer(loaded.model)
    engine = Engine(scorer, optim, total_steps=total_steps, device=device, compute_dtype=compute_dtype, spread=spread, fill=loaded.fill)
    return Built(engine, compiler, loaded, None, tokenizer, stop_ids, None, [])


class Base:
    """What an actor with an adapter of its own starts from: the actor itself, its adapter switched off while it scores."""

    def __init__(self, actor: Built):
        assert actor.adapted is not None
        self._adapted, self._engine = actor.adapted, actor.engine

    def score(self, micro_batches: Iterable[Batch]) -> list[Any]:
        """As `Engine.score`."""
        scorer: Any = self._engine.scorer
        entropy, scorer.entropy = scorer.entropy, False
        try:
            with self._adapted.disable_adapter():
                for parameter in self._engine.trained:  # peft freezes them too, and FSDP2's first forward pass would take them for frozen
                    parameter.requires_grad = True
                return self._engine.score(micro_batches)
        finally:
            scorer.entropy = entropy


def build_reference(settings: ModelConfig, actor: Built, device: torch.device, path: str | None = None) -> Engine | Base:
    """A frozen model in the dtype of the arithmetic, spread as the actor is; it scores as the actor does.

    Args:
        path: of another model with the actor's vocabulary; None: what the actor starts from.
    Raises:
        UserError: no such model, or one with another vocabulary.
    """
    adapter = settings.lora_adapter_path if path is None else None
    if path is None and actor.adapted is not None and adapter is None and settings.trainable_tokens is None:
        return Base(actor)
    if path is not None:
        _check_same_tokens(actor.tokenizer, path, trust_remote_code=settings.trust_remote_code)
    spread, compute_dtype = choose_spread(settings, device), _compute_dtype(settings.compute_dtype, device)
    source, trusted, loaded = path or settings.partial_pretrain, settings.trust_remote_code, None
    if _will_be_sharded(spread) and adapter is None:
        loaded = load_without_values(source, dtype=compute_dtype, trust_remote_code=trusted)
    if loaded is None:
        loaded = load_for_training(source, device=device, dtype=compute_dtype, trust_remote_code=trusted)
    if adapter is not None:
        from verl.models.adapters.files import put_on

        put_on(loaded.model, adapter).merge_and_unload()
    check_vocabulary(loaded.model, actor.tokenizer, source)
    temperature = getattr(actor.engine.scorer, "temperature", 1.0)
    scorer = TokenScorer(loaded.model, temperature)
    return Engine(scorer, None, total_steps=0, device=device, compute_dtype=compute_dtype, spread=spread, fill=loaded.fill)


def _check_same_tokens(tokenizer: PreTrainedTokenizerBase, path: str, *, trust_remote_code: bool) -> None:
    """Raises UserError if a model's own tokenizer reads some token id of ours otherwise."""
    mine, theirs = tokenizer.get_vocab(), load_tokenizer(path, trust_remote_code=trust_remote_code).get_vocab()
    odd = [token for token, number in mine.items() if theirs.get(token) != number]
    if odd:
        found = theirs.get(odd[0], "no token")
        raise UserError(
            f"{len(odd):,} tokens of the actor are others there: {odd[0]!r} is {mine[odd[0]]} here and {found} there",
            where=path,
            fix="choose a model of the actor's family, with the same tokenizer",
        )


def choose_spread(settings: ModelConfig, device: torch.device) -> Spread:
    """How the weights are to lie on the processes; "auto" puts all of them on each GPU where they take a small part of it.

    Raises:
        UserError: the number of processes is no multiple of the shards' number, or what is offloaded has no room.
    """
    fsdp = settings.fsdp_config
    if fsdp.shard_size is not None and dist.world_size() % fsdp.shard_size:
        raise UserError(
            f"{dist.world_size()} processes are not a multiple of {fsdp.shard_size}",
            where="model.fsdp_config.shard_size",
            fix=f"give one of {', '.join(str(n) for n in range(1, dist.world_size() + 1) if dist.world_size() % n == 0)}, or leave it out",
        )
    pin = False
    if fsdp.cpu_offload and device.type != "cpu":
        _check_host_memory(settings)
        pin = _bytes_offloaded(settings, pinned=True) <= dist.host_memory()
    sharding = Sharding(fsdp.shard_size, fsdp.reshard_after_forward, fsdp.cpu_offload, pin)
    if settings.strategy == "ddp" or (settings.strategy == "auto" and _is_small(settings, device)):
        return Spread("ddp", sharding)
    return Spread("fsdp2", sharding)


def _check_host_memory(settings: ModelConfig) -> None:
    """Raises UserError if this node's shards of weights, gradients and moments are more than its memory."""
    needed, there = _bytes_offloaded(settings), dist.host_memory()
    if needed > there:
        raise UserError(
            f"weights, gradients and optimizer state of {_count_parameters(settings):,} parameters take {needed / 2**30:.1f} GiB "
            f"of this machine's memory, which has {there / 2**30:.1f}",
            where="model.fsdp_config.cpu_offload=true",
            fix="use more machines, model.lora_rank=64, or model.param_dtype=bfloat16 optim.name=adamw_8bit without offloading",
        )


def _bytes_offloaded(settings: ModelConfig, *, pinned: bool = False) -> int:
    """What this node's processes keep in host memory; pinned weights and gradients may take twice their size."""
    adapters = settings.lora_rank > 0 or settings.lora_adapter_path is not None
    each = (BYTES_FROZEN if adapters else BYTES_OFFLOADED) + (BYTES_PINNED if pinned else 0)
    shards, local = settings.fsdp_config.shard_size or dist.world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return _count_parameters(settings) * each * local // shards


def _count_parameters(settings: ModelConfig) -> int:
    return count_parameters(settings.partial_pretrain, trust_remote_code=settings.trust_remote_code)


def _is_small(settings: ModelConfig, device: torch.device) -> bool:
    fsdp = settings.fsdp_config
    if device.type != "cuda" or fsdp.cpu_offload or fsdp.shard_size is not None or settings.param_dtype != "float32":
        return False
    adapters = settings.lora_rank > 0 or settings.lora_adapter_path is not None
    needed = _count_parameters(settings) * (BYTES_FROZEN if adapters else BYTES_TRAINED)
    return needed <= SMALL_SHARE * torch.cuda.get_device_properties(device).total_memory


def _load(settings: ModelConfig, spread: Spread, device: torch.device, compute_dtype: torch.dtype) -> tuple[Loaded, TokenScorer]:
    """The model, in the dtype that the optimizer updates. Where it is to be sharded it has no values yet (`Loaded.fill`)."""
    offload, dtype = spread.sharding.cpu_offload, getattr(torch, settings.param_dtype)
    home = torch.device("cpu") if offload else device
    adapters = settings.lora_rank > 0 or settings.lora_adapter_path is not None
    if _will_be_sharded(spread) and not _starts_from_values(settings):
        frozen = compute_dtype if adapters else dtype
        loaded = load_without_values(settings.partial_pretrain, dtype=frozen, trust_remote_code=settings.trust_remote_code)
        if loaded is not None:
            _check(TokenScorer(small_twin(loaded.model, device)))
            return loaded, TokenScorer(loaded.model)
    if adapters and compute_dtype != torch.float32 and not (settings.use_dora or settings.load_in_4bit):
        # What is frozen needs no float32; DoRA starts from the norms of its rows, which do.
        loaded = load_for_training(
            settings.partial_pretrain, device=home, dtype=compute_dtype, trust_remote_code=settings.trust_remote_code
        )
        _check(TokenScorer(small_twin(loaded.model, device)))
        return loaded, TokenScorer(loaded.model)
    loaded = load_for_training(
        settings.partial_pretrain,
        device=home,
        trust_remote_code=settings.trust_remote_code,
        quantization=four_bit(settings, compute_dtype),
    )
    scorer = TokenScorer(loaded.model)
    _check(scorer)
    _cast(loaded.model, dtype)
    return loaded, scorer


def _starts_from_values(settings: ModelConfig) -> bool:
    """Whether adapters need the weights that they lie beside: their norms, their rounded blocks, or some of their rows."""
    goes_on = {} if settings.lora_adapter_path is None else read_adapter_config(settings.lora_adapter_path) or {}
    asked = settings.use_dora or settings.load_in_4bit or settings.trainable_tokens is not None
    return bool(asked or goes_on.get("use_dora") or goes_on.get("trainable_token_indices"))


def _will_be_sharded(spread: Spread) -> bool:
    return spread.strategy == "fsdp2" and (dist.world_size() > 1 or spread.sharding.cpu_offload)


def _check(scorer: TokenScorer) -> None:
    """Whether the architecture can be trained in packed batches, and where processes share them, in parts of one."""
    check_scorer(scorer)
    check_parts(scorer)


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
