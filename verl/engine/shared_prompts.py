"""The decision whether the answers to a prompt share it in a micro-batch (`data.share_prompts`; verl.data.groups)."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from verl import dist
from verl.engine.decisions import Decisions
from verl.engine.engine import Engine
from verl.engine.trial import why_not_shared
from verl.models.attention.flash import LARGEST_HEAD
from verl.models.attention.packed import has_flash, uses_short_kernels
from verl.models.per_layer import heads_of, layer_values
from verl.models.randomness import is_random


@dataclass(frozen=True)
class PromptSharing:
    """Whether the answers to a prompt share it.

    Attributes:
        refused: why they do not, in a few words; None: they do.
    """

    refused: str | None = None

    @property
    def on(self) -> bool:
        return self.refused is None

    def describe(self) -> str:
        """Return the decision as one line for the log."""
        if self.on:
            return "prompts: shared; a micro-batch has a prompt once for all of its answers, where that saves an eighth of their tokens"
        return f"prompts: not shared, each answer has its own ({self.refused})"


def choose_sharing(setting: str, engines: Sequence[Engine], decisions: Decisions, longest: int, *, trusted: bool) -> PromptSharing:
    """Decide for models that compute the same micro-batches. They share prompts if that is exact for each of them. Every rank calls it.

    Args:
        setting: `data.share_prompts`.
        decisions: of these models; they have one attention kernel.
        longest: most tokens of a prompt with an answer.
        trusted: `model.trust_remote_code`.
    """
    if setting == "never":
        return PromptSharing("data.share_prompts=never")
    if dist.context_size() > 1:
        return PromptSharing("model.context_parallel_size splits documents over processes")
    by_flash = has_flash(decisions.device.type, decisions.compute_dtype) and decisions.attention.kernel != "sdpa"
    mine = next((why for engine in engines if (why := _why_not(engine, by_flash, longest, trusted=trusted)) is not None), None)
    return PromptSharing(next((why for why in dist.gathered(mine) if why is not None), None))


def _why_not(engine: Engine, by_flash: bool, longest: int, *, trusted: bool) -> str | None:
    """Return why documents cannot share a prefix in this model, in a few words; None if they can."""
    scorer, config = engine.scorer, engine.scorer.model.config
    kind = f"this {config.model_type} model"
    if not scorer.path.packed:
        return f"{kind} runs one document at a time"
    if scorer.path.recurrent:
        return f"the layers of {kind} carry a state from token to token"
    if scorer.rope is not None:
        return f"the rotary embeddings of {kind} depend on the length of a document"
    if engine.router_loss is not None:
        return "the routers' load-balancing loss counts the tokens of each answer"
    if scorer.training and is_random(scorer, config):
        return "dropout is drawn for each answer"
    if by_flash and (window := _shortest_window(config)) is not None and window < longest:
        return f"FlashAttention has no prefixes in windows of {window:,} tokens, and an answer with its prompt may have {longest:,}"
    if (why := why_not_shared(config, scorer.model.name_or_path or kind, trust_remote_code=trusted)) is not None:
        return f"{kind}: {why}"
    if by_flash and scorer.path.fused:
        from verl.models.attention import shared_trial  # what only a GPU needs

        heads = [each for each in heads_of(config) if each.size <= LARGEST_HEAD]  # larger ones take the plain path
        return shared_trial.refusal(engine.device, engine.compute_dtype, *heads, short=uses_short_kernels())
    return None


def _shortest_window(config: PretrainedConfig) -> int | None:
    """Return the smallest sliding window of the layers, in tokens; None if they have none."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or ["sliding"]
    windows = [window for (window,) in layer_values(text, "sliding_window") if window]
    return min(windows, default=None) if any("sliding" in kind for kind in kinds) else None
