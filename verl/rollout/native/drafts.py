"""Drafts of the next tokens of an answer, from its prompt, its own tokens and other answers to the same prompt (suffix lookup).

A draft is what followed the last tokens of the answer where they occurred before (prompt lookup decoding, Saxena 2023). The search compares
every position of a few texts at once, on the device, without waiting for it, so that it can be part of a CUDA graph.

Dimensions: S slots, B rows of a step (the first B slots), X texts, L positions of a text, M texts that are searched for a slot, E positions
at which a match may end, K drafts of a slot, G maximum response length, R subset of the slots.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from verl.rollout.native.scheduler import Compaction, Prompt, Request
from verl.rollout.native.slots import SlotSize, State, to_device

SEARCHED = 8  # texts that are searched for a slot: its own and the latest others of its prompt
COMPARED = 4  # last tokens that are compared; of two matches, the longer one is taken, then the later one
LEAST_MATCH = 2  # tokens; after a shorter match, drafts are seldom right


class Drafter:
    """Makes drafts from the prompts and answers of a call, and counts how they fare.

    Texts are token ids on the device. As many answers as there are slots are kept after they have ended.

    Args:
        size: size of the slots.
    Attributes:
        size: size of the slots.
        token_XL: tokens of each text, int32; the last text is that of slots without a request.
        length_X: number of these tokens, int32.
        text_S: text of each slot, int64.
        prompt_S: length of the prompt of each slot, int64.
        source_SM: texts to search for each slot, its own first, int64.
        counts_3: tokens that verify steps kept, rows that kept any, and tokens that were computed, int64; set to 0 by whoever reads them.
    """

    def __init__(self, size: SlotSize, device: torch.device):
        self.size = size
        self._device, self._idle = device, 2 * size.slots
        # `record` writes whole rows of answers, of which the last may begin at the end of the longest prompt.
        self.token_XL = torch.zeros(self._idle + 1, COMPARED + size.positions + size.longest_answer, dtype=torch.int32, device=device)
        self.length_X = torch.zeros(self._idle + 1, dtype=torch.int32, device=device)
        self.text_S = torch.full((size.slots,), self._idle, device=device)
        self.prompt_S = torch.zeros(size.slots, dtype=torch.int64, device=device)
        self.source_SM = torch.full((size.slots, SEARCHED), self._idle, device=device)
        # Among matches of equal length, the last position of the row's own text counts, then that of the latest other text.
        self._order_M = torch.tensor([SEARCHED, *range(1, SEARCHED)], dtype=torch.int32, device=device)
        self.counts_3 = torch.zeros(3, dtype=torch.int64, device=device)
        self.reset()

    def reset(self) -> None:
        """Forget all texts, at the start of a call."""
        self._unused, self._ended = deque(range(self._idle)), deque[int]()
        self._prompt_of: dict[int, Prompt] = {}  # by text
        self._texts_of: dict[Prompt, list[int]] = {}  # in the order in which they began
        self._text_of_slot = [self._idle] * self.size.slots
        self.length_X.zero_()
        self.counts_3.zero_()
        self._assign(range(self.size.slots))

    # --- which text belongs to which slot

    def begin(self, seated: Sequence[tuple[int, Request]]) -> None:
        """Start a text with the prompt of each request."""
        prompts = [request.prompt for _, request in seated]
        for (slot, _), prompt in zip(seated, prompts, strict=True):
            self._text_of_slot[slot] = self._new_text(prompt)
        self._write([self._text_of_slot[slot] for slot, _ in seated], prompts)
        self._assign([slot for slot, _ in seated])

    def add(self, texts: Sequence[tuple[Prompt, Sequence[int]]]) -> None:
        """Add prompts with answers that have ended, to be searched like those of this call."""
        numbers = [self._new_text(prompt) for prompt, _ in texts]
        self._write(numbers, [(*prompt, *answer) for prompt, answer in texts])
        self._ended.extend(numbers)
        self._assign(range(self.size.slots))

    def end(self, slots: Sequence[int]) -> None:
        """Keep the texts of slots whose responses have ended and were recorded, until other texts need their place."""
        for slot in slots:
            self._ended.append(self._text_of_slot[slot])
            self._text_of_slot[slot] = self._idle
        self._assign(slots)

    def move(self, compaction: Compaction) -> None:
        """Follow responses that move to lower slots."""
        for source, target in zip(compaction.sources, compaction.targets, strict=True):
            self._text_of_slot[target], self._text_of_slot[source] = self._text_of_slot[source], self._idle
        self._assign([*compaction.sources, *compaction.targets])

    def _new_text(self, prompt: Prompt) -> int:
        if not self._unused:
            oldest = self._ended.popleft()
            before = self._prompt_of.pop(oldest)
            self._texts_of[before].remove(oldest)
            self._unused.append(oldest)
        text = self._unused.popleft()
        self._prompt_of[text] = prompt
        self._texts_of.setdefault(prompt, []).append(text)
        return text

    def _write(self, texts: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        token_RL = np.zeros((len(texts), max(map(len, tokens))), dtype=np.int32)
        for token_L, own in zip(token_RL, tokens, strict=True):
            token_L[: len(own)] = own
        text_R = to_device(texts, self._device)
        self.token_XL[text_R, : token_RL.shape[1]] = to_device(token_RL, self._device)
        self.length_X[text_R] = to_device(list(map(len, tokens)), self._device).int()

    def _assign(self, slots: Sequence[int]) -> None:
        """Copy to the device which texts belong to these slots, and which are searched for them.

        The texts of a slot stay those from when its request started. One of them may become another text later, with useless drafts.
        """
        texts = [self._text_of_slot[slot] for slot in slots]
        source_RM = np.repeat(np.array(texts)[:, None], SEARCHED, 1)
        for source_M, text in zip(source_RM, texts, strict=True):
            others = [other for other in self._texts_of.get(self._prompt_of.get(text, ()), ()) if other != text][-(SEARCHED - 1) :]
            source_M[1 : 1 + len(others)] = others
        # In place, because CUDA graphs read them.
        slot_R = to_device(list(slots), self._device)
        self.source_SM[slot_R] = to_device(source_RM, self._device)
        self.text_S[slot_R] = to_device(texts, self._device)
        self.prompt_S[slot_R] = to_device([len(self._prompt_of.get(text, ())) for text in texts], self._device)

    def count(self, kept_B: Tensor, tokens: int) -> None:
        """Count a verify step of this many tokens."""
        self.counts_3[0] += kept_B.sum()
        self.counts_3[1] += (kept_B > 0).sum()
        self.counts_3[2] += tokens

    # --- on the device

    def record(self, state: State, rows: int) -> None:
        """Add the new tokens of the first `rows` slots to their texts."""
        text_B, answer_BG = self.text_S[:rows], state.answer_SG[:rows]
        at_BG = self.prompt_S[:rows, None] + torch.arange(answer_BG.shape[1], device=self._device)
        self.token_XL[text_B[:, None], at_BG] = answer_BG
        self.length_X[text_B] = self.prompt_S[:rows].int() + state.generated_S[:rows]

    def draft(self, state: State, rows: int, number: int, used: int | None = None) -> tuple[Tensor, Tensor]:
        """Return draft_BK, int64, and count_B, how many of the `number` drafts of each row are to be tried.

        A row has none if its response has ended, no match is long enough, or its next token is its last one.

        Args:
            used: no text is longer than this; None: unknown.
        """
        own_B, source_BM = self.text_S[:rows], self.source_SM[:rows]
        token_BML = self.token_XL[source_BM] if used is None else self.token_XL[:, : max(used, COMPARED)][source_BM]
        left_BM = self.length_X[source_BM]
        match_B, best_B, end_B = self._longest_match(token_BML, left_BM, own_B)
        row_B = torch.arange(rows, device=self._device)
        left_B1 = (left_BM[row_B, best_B] - end_B - 1).clamp(min=1)[:, None]  # tokens behind the match
        # A text that repeats itself goes on repeating itself: behind its last token comes the first draft again.
        at_BK = end_B[:, None] + 1 + torch.arange(number, device=self._device) % left_B1
        draft_BK = token_BML[row_B[:, None], best_B[:, None], at_BK.clamp(max=token_BML.shape[2] - 1)]  # without a match, it is anywhere
        count_B = torch.where(best_B == 0, number, left_B1[:, 0].clamp(max=number))
        room_B = (state.limit_S[:rows] - state.generated_S[:rows] - 1).clamp(min=0)
        count_B = torch.minimum(count_B, room_B) * ((match_B >= LEAST_MATCH) & (state.active_S[:rows] > 0))
        return draft_BK.long(), count_B.long()

    def _longest_match(self, token_BML: Tensor, length_BM: Tensor, own_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return how many of its last COMPARED tokens each row finds at one place, the number of that text, and the position of their end.

        Of places with equally many, it is the last one in the row's own text, then that in the latest other text. A token follows it.
        """
        first = COMPARED - 1  # a match ends at this position at the earliest
        positions, last_B = token_BML.shape[2], self.length_X[own_B].long() - 1
        end_E = torch.arange(first, positions, dtype=torch.int32, device=self._device)
        same_BME = end_E < length_BM[..., None] - 1
        match_BME = torch.zeros_like(same_BME, dtype=torch.int32)
        for back in range(COMPARED):
            token_B = self.token_XL[own_B, (last_B - back).clamp(min=0)]
            same_BME = same_BME & (token_BML[..., first - back : positions - back] == token_B[:, None, None])
            match_BME += same_BME
        score_BME = (match_BME * (SEARCHED + 1) + self._order_M[:, None]) * positions + end_E
        best_B = score_BME.flatten(1).argmax(1)
        match_B = match_BME.flatten(1).gather(1, best_B[:, None]).squeeze(1)
        return match_B, best_B // len(end_E), best_B % len(end_E) + first
