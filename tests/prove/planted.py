"""Faults that people have met in this and other programs, planted into verl: each must show in a line of `verl prove`."""

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from verl.data.batch import Batch
from verl.data.chat import ChatInput
from verl.data.render import Rendered, Renderer
from verl.engine.engine import Engine
from verl.models.attention.packed import PACKED
from verl.rollout.native.attention import SLOTS

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Fault:
    """A planted fault.

    Attributes:
        family: a family of tests/prove/configs.py that shows it.
        proof: module in verl/prove/proofs whose line must be wrong.
        plant: breaks verl.
        needs: module that has what is broken.
    """

    family: str
    proof: str
    plant: Callable[[Patch], None]
    needs: str = "verl.engine.engine"

    @property
    def is_there(self) -> bool:
        return importlib.util.find_spec(self.needs) is not None


def without_checks(patch: Patch) -> None:
    """The checks at loading would refuse a fault before the proof sees it."""
    patch.setattr("verl.engine.build._check", lambda *_: None)
    if importlib.util.find_spec("verl.engine.trial"):
        trial = importlib.import_module("verl.engine.trial")
        patch.setattr(trial, "choose_path", lambda *_, **__: trial.PACKED_PATH)
    patch.setattr("verl.rollout.native.engine.NativeRollout._check", lambda _: None)
    patch.setattr("verl.rollout._plain.Probe.is_exact", lambda *_, **__: True)


def without_windows(patch: Patch, attention: str) -> None:
    """An attention function that attends to all tokens before one."""
    functions = AttentionInterface._global_mapping
    real = functions[attention]
    patch.setitem(functions, attention, lambda *arguments, **named: real(*arguments, **{**named, "sliding_window": None}))


def windows_are_lost_in_training(patch: Patch) -> None:
    """Packed attention sees tokens beyond the window, which short probes do not show (F3)."""
    without_checks(patch)
    without_windows(patch, PACKED)


def windows_are_lost_in_generation(patch: Patch) -> None:
    """What limits attention does not reach the native engine (F2)."""
    without_checks(patch)
    without_windows(patch, SLOTS)


def frequencies_of_the_longest(patch: Patch) -> None:
    """Rotary embeddings take the length of the longest document of a batch for all (F4)."""
    without_checks(patch)
    patch.setattr("verl.models.rope.LengthRope.documents", lambda *_: nullcontext())


def router_loss_is_lost(patch: Patch) -> None:
    """The auxiliary loss that the config asks for is not trained (TRL#7009, Automodel#1408)."""
    patch.setattr("verl.engine.router_loss.find_router_loss", lambda *_: (None, []))


def attention_across_documents(patch: Patch) -> None:
    """All documents of a batch are one: attention and recurrent states go over from one to the next (ms-swift#9565, axolotl#3453)."""
    without_checks(patch)
    real = Batch.to

    def to(batch: Batch, device: Any) -> Batch:
        moved = real(batch, device)
        length = len(moved.input_ids_T)
        return replace(moved, cu_seqlens=torch.tensor([0, length], dtype=torch.int32), max_seqlen=length)

    patch.setattr(Batch, "to", to)


def messages_one_by_one(patch: Patch) -> None:
    """Each message is rendered alone, though the template looks at its neighbours (slime#2263)."""
    real = Renderer.chats

    def chats(self: Renderer, inputs: list[ChatInput]) -> list[Any]:
        found = []
        for chat in inputs:
            messages: Any = chat.messages
            turns = [real(self, [ChatInput(messages[i : i + 2])])[0] for i in range(0, len(messages), 2)]
            parts = [turn for turn in turns if isinstance(turn, Rendered)]
            found.append(Rendered([i for part in parts for i in part.input_ids], [m for part in parts for m in part.loss_mask]))
        return found

    patch.setattr(Renderer, "chats", chats)


def change_rendered(patch: Patch, change: Callable[[Rendered], Rendered]) -> None:
    real = Renderer.chats
    patch.setattr(Renderer, "chats", lambda self, inputs: [change(r) if isinstance(r, Rendered) else r for r in real(self, inputs)])


def everything_is_trained(patch: Patch) -> None:
    """The loss mask is all ones."""
    change_rendered(patch, lambda rendered: replace(rendered, loss_mask=[True] * len(rendered.loss_mask)))


def mean_of_means(patch: Patch) -> None:
    """The loss is the mean of the micro-batches' means: it depends on accumulation."""
    real = Engine._backward
    backward = Engine.backward

    def of_all(self: Engine, batches: list[Batch], *rest: Any, **named: Any) -> Any:
        self.__dict__["micro_batches"] = len(batches)
        return backward(self, batches, *rest, **named)

    def of_one(self: Engine, batch: Batch, algorithm: Any, scale: Any, *rest: Any, **named: Any) -> Any:
        return real(self, batch, algorithm, scale * 0 + 1.0 / (len(batch.trained_M) * self.__dict__["micro_batches"]), *rest, **named)

    patch.setattr(Engine, "backward", of_all)
    patch.setattr(Engine, "_backward", of_one)


def padding_is_attended(patch: Patch) -> None:
    """Generation in a batch does not hide the padding on the left (F7)."""
    without_checks(patch)
    from verl.rollout import hf

    real = hf.pad_left

    def pad_left(*arguments: Any, **named: Any) -> Any:
        ids_BP, mask_BP = real(*arguments, **named)
        return ids_BP, torch.ones_like(mask_BP)

    patch.setattr(hf, "pad_left", pad_left)


def dropout_stays_on(patch: Patch) -> None:
    """In reinforcement learning the model drops at random, where it is no module (F5)."""

    def stays(engine: Engine, **_: Any) -> dict[str, float]:
        engine.scorer.train()
        return {}

    patch.setattr("verl.rl.roles.hold_still", stays)


def merged_without_experts(patch: Patch) -> None:
    """A merged adapter is its base: the products of the adapters are lost (unsloth#6930)."""
    from verl.models.adapters import files

    real = files.attach

    def attach(model: nn.Module, path: str) -> Any:
        adapted = real(model, path)  # type: ignore[arg-type]
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
        return adapted

    patch.setattr(files, "attach", attach)
    patch.setattr("verl.models.export.files.attach", attach)


def adapter_raises(patch: Patch) -> None:
    """An adapter that training has written ends in an exception when it is loaded (F1, F10)."""

    def attach(model: nn.Module, path: str) -> Any:
        raise TypeError("linear(): argument 'input' must be Tensor, not tuple")

    patch.setattr("verl.models.adapters.files.attach", attach)


def last_token_is_left_out(rendered: Rendered) -> Rendered:
    mask = np.array(rendered.loss_mask)
    mask[np.flatnonzero(mask)[-1:]] = False
    return replace(rendered, loss_mask=mask.tolist())


def stop_token_is_masked(patch: Patch) -> None:
    """The token that ends an answer is not trained, so that it never ends."""
    change_rendered(patch, last_token_is_left_out)
