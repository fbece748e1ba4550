"""A model with a head, which scores documents at their last token in packed micro-batches.

Dimensions: A documents; L labels.
"""

from collections.abc import Sequence

import numpy as np
import torch

from verl.data.pack import collate, pack
from verl.engine.decisions import choose_compute_dtype
from verl.engine.trial import check_hidden, choose_path
from verl.engine.value_scorers import LabelScorer, RewardScorer
from verl.models.heads import load_reward_model
from verl.models.load import check_vocabulary, load_tokenizer, read_config
from verl.models.shards import small_twin


class PackedModel:
    """A reward model or a classifier, in bfloat16 on a GPU, else in float32.

    Args:
        path: directory or Hub name.
        device: the process's attention kernel must support the model's heads there.
        token_budget: tokens of a micro-batch; a longer document has one of its own.
        labels: number of the head's outputs.
        where: the place of errors.
    Attributes:
        tokenizer: the model's own.
        config: the model's.
        longest: the model's positions; None: no limit is known.
    Raises:
        UserError: no such model, it has another number of labels, or its architecture does not support packed batches.
    """

    def __init__(
        self, path: str, *, device: torch.device | str, token_budget: int, labels: int = 1, trust_remote_code: bool = False, where: str
    ):
        self._device, self._budget, self._outputs = torch.device(device), token_budget, labels
        dtype = choose_compute_dtype("auto", self._device)
        forward = choose_path(read_config(path, trust_remote_code=trust_remote_code), path, trust_remote_code=trust_remote_code)
        model = load_reward_model(
            path, device=self._device, dtype=dtype, trust_remote_code=trust_remote_code, attention=forward.attention, labels=labels
        ).model
        self.tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code, completes_template=False)
        check_vocabulary(model, self.tokenizer, path)
        # In bfloat16, rounding hides errors of packing: check a small float32 model of the same architecture instead.
        checked = model if dtype == torch.float32 else small_twin(model, self._device, forward.attention)
        check_hidden(RewardScorer(checked, forward), where=where)
        self.scorer = LabelScorer(model.requires_grad_(False), forward).eval()
        self.config = model.config
        self.longest: int | None = getattr(model.config, "max_position_embeddings", None)

    @torch.no_grad()
    def scores(self, documents: Sequence[np.ndarray]) -> np.ndarray:
        """Return the head's outputs for each document, float32 [A, L]."""
        lengths = [len(ids) for ids in documents]
        scores_AL = np.zeros((len(documents), self._outputs), dtype=np.float32)
        for group in pack(lengths, token_budget=max([self._budget, *lengths]), multiple_of=1) if documents else []:
            batch = collate([(documents[i], np.zeros(lengths[i], dtype=bool)) for i in group], group)
            scores_AL[group] = self.scorer(batch.to(self._device)).score_S.cpu().numpy()
        return scores_AL
