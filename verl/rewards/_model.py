"""A reward model: a sequence classifier with one label, which scores an answer at the last token of the chat.

It uses its own chat template and tokenizer, so its model family may differ from the policy's.

Dimensions: A answers; S documents of a micro-batch.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from verl.config.ppo import RewardModelConfig
from verl.data.chat import Message
from verl.data.pack import collate, pack
from verl.data.render import Renderer
from verl.engine.decisions import choose_compute_dtype
from verl.engine.trial import check_hidden, choose_path
from verl.engine.value_scorers import RewardScorer
from verl.errors import UserError
from verl.models.heads import has_head, load_reward_model
from verl.models.kind import LANGUAGE_MODEL, REWARD_MODEL, check_kind, kind_of
from verl.models.load import check_vocabulary, load_tokenizer, read_config
from verl.models.shards import small_twin

WHERE = "reward_model.path"


def check_scores(config: RewardModelConfig) -> None:
    """Check that the model has a scoring head, without reading its weights. Raises UserError: it has none, or there is no such model."""
    assert config.path is not None
    if kind_of(config.path) != LANGUAGE_MODEL:  # of a language model, the error below says what to do
        check_kind(config.path, (REWARD_MODEL,), where=f"{WHERE}={config.path}")
    if not has_head(config.path, trust_remote_code=config.trust_remote_code):
        fix = "train one with python -m verl.trainer.reward_trainer, or name a sequence classifier with one label"
        raise UserError(f"{config.path} is a language model without a scoring head", where=WHERE, fix=fix)


class RewardModel:
    """Scores answers in packed micro-batches.

    Args:
        config: the model's path, and the token budget of its micro-batches.
        device: device of the model, which is in bfloat16 on a GPU, else in float32. The process's attention kernel must support its heads.
        tokenizer: the policy's tokenizer; if the reward model's tokenizer or template differs, `say` reports it. None: nothing is compared.
        say: prints a message.
    Raises:
        UserError: no such model; it has no scoring head; or its architecture does not support packed batches.
    """

    def __init__(
        self,
        config: RewardModelConfig,
        *,
        device: torch.device | str,
        tokenizer: PreTrainedTokenizerBase | None,
        say: Callable[[str], None],
    ):
        assert config.path is not None
        path, device = config.path, torch.device(device)
        check_scores(config)
        dtype = choose_compute_dtype("auto", device)
        trusted = config.trust_remote_code
        forward = choose_path(read_config(path, trust_remote_code=trusted), path, trust_remote_code=trusted)
        model = load_reward_model(path, device=device, dtype=dtype, trust_remote_code=trusted, attention=forward.attention).model
        own = load_tokenizer(path, trust_remote_code=config.trust_remote_code, completes_template=False)
        check_vocabulary(model, own, path)
        # In bfloat16, rounding hides errors of packing: check a small float32 model of the same architecture instead.
        checked = model if dtype == torch.float32 else small_twin(model, device, forward.attention)
        check_hidden(RewardScorer(checked, forward), where=WHERE)
        self._scorer = RewardScorer(model.requires_grad_(False), forward).eval()
        self._renderer, self._padding = Renderer(own), model.config.pad_token_id
        self._device, self._budget = device, config.max_tokens_per_micro_batch
        self._longest = getattr(model.config, "max_position_embeddings", None)
        if tokenizer is not None and Renderer(tokenizer).fingerprint() != self._renderer.fingerprint():
            say(f"reward model {path} has another tokenizer or chat template than the policy: answers are tokenized again with its own")

    @torch.no_grad()
    def score(self, chats: Sequence[Sequence[Message]], responses: Sequence[str]) -> np.ndarray:
        """Score each answer, float32 [A]. A score may be NaN or infinite, if the model's output is.

        Args:
            chats: the messages before each answer.
            responses: the answers, without their stop tokens.
        Raises:
            UserError: the model's chat template rejects a chat, or a chat is longer than the model's context.
        """
        documents = self._documents([[*chat, {"role": "assistant", "content": r}] for chat, r in zip(chats, responses, strict=True)])
        scores_A = np.zeros(len(documents), dtype=np.float32)
        lengths = [len(ids) for ids in documents]
        for group in pack(lengths, token_budget=max([self._budget, *lengths]), multiple_of=1) if documents else []:
            batch = collate([(documents[i], np.zeros(lengths[i], dtype=bool)) for i in group], group)
            scores_A[group] = self._scorer(batch.to(self._device)).score_S.cpu().numpy()
        return scores_A

    def _documents(self, chats: list[list[Message]]) -> list[np.ndarray]:
        """Return the token ids of each whole chat, int32, rendered and encoded as transformers does.

        Raises:
            UserError: the template rejects a chat, or a chat is longer than the model's context.
        """
        documents = [np.array(self._without_padding(self._renderer.whole(chat)), dtype=np.int32) for chat in chats]
        longest = max(map(len, documents), default=0)
        if self._longest is not None and longest > self._longest:
            fix = "lower data.max_prompt_length or rollout.max_new_tokens, or choose a model for longer texts"
            raise UserError(
                f"a question with its answer has {longest:,} tokens; the model's context has {self._longest:,}", where=WHERE, fix=fix
            )
        return documents

    def _without_padding(self, ids: list[int]) -> list[int]:
        """Return the tokens up to the last one that is not the padding token: there transformers reads the score."""
        end = len(ids)
        while end > 1 and ids[end - 1] == self._padding:
            end -= 1
        return ids[:end]
