"""A reward model: a sequence classifier whose output at the last token scores an answer.

It has one label, or it is a classifier and the probability of one of its labels is the score. It uses its own chat template and tokenizer,
so its model family may differ from the policy's.

Dimensions: A answers; L labels.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from verl.config.reward_models import OneModel, RewardModelConfig, reward_models
from verl.data.chat import Message
from verl.data.classified import tokens_of
from verl.data.labels import labels_of
from verl.data.render import Renderer
from verl.errors import UserError
from verl.models.heads import has_head
from verl.models.kind import CLASSIFIER, LANGUAGE_MODEL, REWARD_MODEL, check_kind, kind_of
from verl.models.load import read_config
from verl.rewards._packed import PackedModel

WHERE = "reward_model.path"


def check_scores(config: RewardModelConfig) -> None:
    """Check that each model has a scoring head, without reading its weights. Raises UserError: one has none, or there is no such model."""
    for one in reward_models(config):
        check_one(one, trusted=config.trust_remote_code)


def check_one(model: OneModel, *, trusted: bool) -> None:
    """Check one of the models, as `check_scores` does."""
    path = model.path
    if kind_of(path) != LANGUAGE_MODEL:  # of a language model, the error below says what to do
        check_kind(path, (REWARD_MODEL, CLASSIFIER), where=model.where)
    if not has_head(path, trust_remote_code=trusted):
        fix = "train one with python -m verl.trainer.reward_trainer, or name a sequence classifier with one label"
        raise UserError(f"{path} is a language model without a scoring head", where=WHERE, fix=fix)
    _label_number(model, trusted=trusted)


def _label_number(model: OneModel, *, trusted: bool) -> int | None:
    """Return the number of the label whose probability is the score; None if the model has one output.

    Raises:
        UserError: the model is a classifier and no label is named, or it has no such label.
    """
    config = read_config(model.path, trust_remote_code=trusted)
    if config.num_labels == 1 or not any(name.endswith("Classification") for name in config.architectures or []):
        if model.label is None:
            return None
        raise UserError(f"{model.path} has one output and no labels", where=f"reward_model.label={model.label}", fix="remove this key")
    names = labels_of(config).names
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    if model.label is None:
        what = f"has {len(names)} labels, expected one: {shown}"
        raise UserError(what, where=model.where, fix=f"name the label whose probability is the reward: reward_model.label={names[-1]}")
    if model.label not in names:
        raise UserError(f"{model.path} has the labels {shown}", where=f"reward_model.label={model.label}", fix="name one of them")
    return names.index(model.label)


class RewardModel:
    """Scores answers in packed micro-batches.

    Args:
        config: the path of one model, and the token budget of its micro-batches.
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
        number: int = 0,
    ):
        self._settings = one = reward_models(config)[number]
        trusted = config.trust_remote_code
        check_one(one, trusted=trusted)
        self._label = _label_number(one, trusted=trusted)
        found = None if self._label is None else labels_of(read_config(one.path, trust_remote_code=trusted))
        self._is_one_of = found is not None and found.problem == "one"
        labels = 1 if found is None else len(found.names)
        budget = config.max_tokens_per_micro_batch
        self._model = PackedModel(one.path, device=device, token_budget=budget, labels=labels, trust_remote_code=trusted, where=one.where)
        self._scorer = self._model.scorer
        self._renderer, self._padding = Renderer(self._model.tokenizer), self._model.config.pad_token_id
        if tokenizer is not None and Renderer(tokenizer).fingerprint() != self._renderer.fingerprint():
            say(f"reward model {one.path} has another tokenizer or chat template than the policy: answers are tokenized again with its own")

    def score(self, chats: Sequence[Sequence[Message]], responses: Sequence[str]) -> np.ndarray:
        """Score each answer, float32 [A]. A score may be NaN or infinite, if the model's output is.

        Args:
            chats: the messages before each answer.
            responses: the answers, without their stop tokens.
        Raises:
            UserError: the model's chat template rejects a chat, or a chat is longer than the model's context.
        """
        if self._settings.reads == "answer":
            read = tokens_of([response if response.strip() else " " for response in responses], self._model.tokenizer)
            documents = self._checked([np.array(one.input_ids, dtype=np.int32) for one in read])
        else:
            documents = self._documents([[*chat, {"role": "assistant", "content": r}] for chat, r in zip(chats, responses, strict=True)])
        scores_AL = self._model.scores(documents)
        if self._label is None:
            return scores_AL.reshape(len(documents))
        logits_AL = torch.from_numpy(scores_AL)
        probability_AL = logits_AL.softmax(-1) if self._is_one_of else logits_AL.sigmoid()
        found: np.ndarray = probability_AL[:, self._label].numpy()
        return found

    def _documents(self, chats: list[list[Message]]) -> list[np.ndarray]:
        """Return the token ids of each whole chat, int32, rendered and encoded as transformers does.

        Raises:
            UserError: the template rejects a chat, or a chat is longer than the model's context.
        """
        return self._checked([np.array(self._without_padding(self._renderer.whole(chat)), dtype=np.int32) for chat in chats])

    def _checked(self, documents: list[np.ndarray]) -> list[np.ndarray]:
        longest = max(map(len, documents), default=0)
        if self._model.longest is not None and longest > self._model.longest:
            fix = "lower data.max_prompt_length or rollout.max_new_tokens, or choose a model for longer texts"
            what = f"a question with its answer has {longest:,} tokens; the model's context has {self._model.longest:,}"
            raise UserError(what, where=WHERE, fix=fix)
        return documents

    def _without_padding(self, ids: list[int]) -> list[int]:
        """Return the tokens up to the last one that is not the padding token: there transformers reads the score."""
        end = len(ids)
        while end > 1 and ids[end - 1] == self._padding:
            end -= 1
        return ids[:end]
