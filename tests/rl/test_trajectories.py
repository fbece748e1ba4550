"""What an agent asks becomes trajectories: tokens that were sampled stay as they are, and nothing is trained twice."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from tool_template import WITH_TOOLS
from transformers import PreTrainedTokenizerBase

from verl.data.prompts import Prompt
from verl.data.render import Renderer
from verl.endpoint.reply import Reply
from verl.endpoint.request import RefusedError, Terms
from verl.models.tiny import tiny_tokenizer
from verl.rl.agent_session import Policy, Session
from verl.rl.replies import Replies
from verl.rl.samples import Sample
from verl.rl.trajectories import Trajectories
from verl.rollout import Completion, Sampling

TEXTS = ['How are you? Fine, and you? Good to hear. calculate add 1234567890 {}[]":,<>/ name arguments tool_call Sure.']
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}


class Scripted:
    """Generates what it is given, turn by turn. A turn with a nap comes late."""

    def __init__(self, *turns: tuple[list[int], str], naps: tuple[float, ...] = ()):
        self._turns, self._naps = list(turns), list(naps)
        self.asked: list[tuple[list[int], Sampling, int]] = []

    async def submit(self, prompt_ids: list[int], sampling: Sampling, seed: int) -> Completion:
        self.asked.append((prompt_ids, sampling, seed))
        ids, reason = self._turns.pop(0)
        if self._naps:
            await asyncio.sleep(self._naps.pop(0))
        kept = ids[: sampling.max_new_tokens]
        return Completion(kept, reason if kept == ids else "length", [-0.5] * len(kept), 3)  # type: ignore[arg-type]


class Desk:
    """An agent's run with a scripted model."""

    def __init__(self, *said: str | list[int], tools: bool = False, room: int = 200, naps: tuple[float, ...] = ()):
        self.tokenizer: PreTrainedTokenizerBase = tiny_tokenizer(TEXTS)
        if tools:
            self.tokenizer.chat_template = WITH_TOOLS
        self.renderer = Renderer(self.tokenizer)
        self.stop = self.renderer.stop_ids[0]
        self.turns = [([*self.tokenizer(text).input_ids, self.stop] if isinstance(text, str) else text, "stop") for text in said]
        self.live = Scripted(*self.turns, naps=naps)
        self.prompt = Prompt("here", "Q", [], [1, 2], {})
        self.trajectories = Trajectories(self.prompt, 5, Replies(self.renderer), self.stop, longest=room + 100, max_new_tokens=room)

    def run(self, agent: Callable[[Session], Any]) -> Any:
        async def running() -> Any:
            policy = Policy(self.live, self.tokenizer, Terms("policy", 1.0), Sampling(200, 1.0), lambda number: 100 + number)  # type: ignore[arg-type]
            return await agent(Session(policy, self.trajectories, "id", 99))

        return asyncio.run(running())

    @property
    def samples(self) -> list[Sample]:
        return [trajectory.sample for trajectory in self.trajectories.found]


def letter_by_letter(word: str) -> list[int]:
    """A turn whose tokens are not those of its text."""
    desk = Desk()
    ids: list[int] = [desk.tokenizer.convert_tokens_to_ids(letter) for letter in word]  # type: ignore[misc]
    assert desk.tokenizer(word).input_ids != ids, "else the test shows nothing"
    return [*ids, desk.stop]


async def ask(session: Session, chat: list[Any], **more: Any) -> Reply:
    reply, _ = await session.answer({"model": "policy", "messages": chat, **more})
    return reply


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_a_chat_that_goes_on_has_the_tokens_and_the_mask_of_the_same_chat_in_fine_tuning() -> None:
    desk = Desk("Fine, and you?", "Good to hear.")

    async def agent(session: Session) -> None:
        chat = [user("How are you?")]
        for _ in range(2):
            chat += [(await ask(session, chat)).message, user("Sure.")]

    desk.run(agent)
    [sample] = desk.samples
    rendered = desk.renderer.chat(
        [
            user("How are you?"),
            {"role": "assistant", "content": "Fine, and you?"},
            user("Sure."),
            {"role": "assistant", "content": "Good to hear."},
        ]
    )
    ids, mask = sample.document
    assert ids.tolist() == rendered.input_ids[: len(ids)] and mask.tolist() == rendered.loss_mask[: len(ids)]
    assert not any(rendered.loss_mask[len(ids) :])
    assert sample.logprobs == [-0.5 if trained else 0.0 for trained in sample.answer_mask]
    assert (sample.turns, sample.earlier, sample.text, sample.version) == (2, ["Fine, and you?", "Sure."], "Good to hear.", 3)
    assert [seed for *_, seed in desk.live.asked] == [100, 101], "each request has random numbers of its own"


def test_tokens_that_were_sampled_are_never_made_again_from_text() -> None:
    spelled = letter_by_letter("calculate")
    desk = Desk(spelled, "Good to hear.")

    async def agent(session: Session) -> None:
        reply = await ask(session, [user("How are you?")])
        await ask(session, [user("How are you?"), {"role": "assistant", "content": f" {reply.message['content']}\n"}, user("Sure.")])

    desk.run(agent)
    assert len(desk.samples) == 1
    first, second = (asked for asked, *_ in desk.live.asked)
    assert second[: len(first) + len(spelled)] == [*first, *spelled]


def test_a_request_that_goes_on_otherwise_begins_with_the_same_tokens_and_trains_them_once() -> None:
    spelled = letter_by_letter("calculate")
    desk = Desk(spelled, "Good to hear.", "Fine, and you?")

    async def agent(session: Session) -> None:
        first = (await ask(session, [user("How are you?")])).message
        await ask(session, [user("How are you?"), first, user("Sure.")])
        await ask(session, [user("How are you?"), first, user("Good.")])

    desk.run(agent)
    one, two = desk.samples
    prefix = [*one.prompt_ids, *spelled]
    assert two.prompt_ids[: len(prefix)] == prefix and two.group == one.group == 5
    assert all(two.answer_mask) and two.turns == 1 and two.text == "Fine, and you?"
    assert sum(one.answer_mask) == len(spelled) + len(desk.turns[1][0])
    assert desk.trajectories.last_text == "Fine, and you?"


@pytest.mark.parametrize(
    "change",
    [
        lambda chat: [{"role": "system", "content": "Be good."}, *chat],
        lambda chat: [user("How are you, sir?"), *chat[1:]],
        lambda chat: [chat[0], {"role": "assistant", "content": "Fine."}, *chat[2:]],
    ],
)
def test_a_request_that_goes_on_with_nothing_begins_a_trajectory(change: Any) -> None:
    desk = Desk("Fine, and you?", "Good to hear.")

    async def agent(session: Session) -> None:
        chat = [user("How are you?")]
        reply = await ask(session, chat)
        await ask(session, change([*chat, reply.message, user("Sure.")]))

    desk.run(agent)
    assert [sample.turns for sample in desk.samples] == [1, 1]
    assert desk.samples[1].prompt_ids == desk.live.asked[1][0]


def test_calls_of_tools_are_read_and_their_results_are_appended() -> None:
    call = 'Sure.<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    desk = Desk(call, "Good to hear.", tools=True)

    async def agent(session: Session) -> Reply:
        chat = [user("How are you?")]
        reply = await ask(session, chat, tools=[TOOL])
        [made] = reply.message["tool_calls"]
        assert (reply.finish_reason, reply.message["content"], made["type"]) == ("tool_calls", "Sure.", "function")
        assert made["function"]["name"] == "add" and json.loads(made["function"]["arguments"]) == {"a": 1}
        # As some frameworks write it: another id, arguments as they write JSON, no content.
        echo = {
            "role": "assistant",
            "content": "Sure.",
            "tool_calls": [{**made, "id": "mine", "function": {"name": "add", "arguments": '{"a":1}'}}],
        }
        return await ask(session, [*chat, echo, {"role": "tool", "tool_call_id": "mine", "content": "2"}], tools=[TOOL])

    assert desk.run(agent).message["content"] == "Good to hear."
    [sample] = desk.samples
    text = desk.tokenizer.decode(sample.prompt_ids + sample.answer_ids)
    assert f"{call}<|im_end|>\n<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\nGood to hear." in text
    assert sample.earlier == [call, "2"]


def test_a_call_that_no_utf_8_has_stays_a_part_of_the_text() -> None:
    call = '<tool_call>{"name": "add", "arguments": {"a": "\\ud800"}}</tool_call>'
    desk = Desk(call, tools=True)
    reply = desk.run(lambda session: ask(session, [user("How are you?")], tools=[TOOL]))
    assert (reply.message, reply.finish_reason) == ({"role": "assistant", "content": call}, "stop")


def test_other_tools_begin_another_trajectory() -> None:
    desk = Desk("Fine, and you?", "Good to hear.", tools=True)

    async def agent(session: Session) -> None:
        chat = [user("How are you?")]
        reply = await ask(session, chat, tools=[TOOL])
        await ask(session, [*chat, reply.message, user("Sure.")])

    desk.run(agent)
    assert len(desk.samples) == 2


def test_tools_are_refused_if_the_template_does_not_print_them() -> None:
    desk = Desk("Fine.")

    async def agent(session: Session) -> None:
        with pytest.raises(RefusedError, match="calls of tools cannot be read"):
            await ask(session, [user("How are you?")], tools=[TOOL])

    desk.run(agent)
    assert desk.samples == []


def test_a_turn_that_was_cut_ends_as_the_template_ends_it_but_does_not_learn_to() -> None:
    desk = Desk("Fine, and you?", "Good to hear.")

    async def agent(session: Session) -> None:
        chat = [user("How are you?")]
        reply = await ask(session, chat, max_tokens=3)
        assert reply.finish_reason == "length"
        await ask(session, [*chat, reply.message, user("Sure.")])

    desk.run(agent)
    [sample] = desk.samples
    assert sample.answer_ids[:4] == [*desk.turns[0][0][:3], desk.stop]
    assert sample.answer_mask[:4] == [True, True, True, False]


def test_an_answer_ends_at_a_stop_text_with_the_tokens_until_then() -> None:
    desk = Desk("Fine, and you? Good to hear.", "Sure.")

    async def agent(session: Session) -> str:
        chat = [user("How are you?")]
        reply = await ask(session, chat, stop=["you?", "hear"])
        await ask(session, [*chat, reply.message, user("Sure.")])
        assert reply.finish_reason == "stop"
        return str(reply.message["content"])

    assert desk.run(agent) == "Fine, and "
    [sample] = desk.samples
    whole, kept = desk.turns[0][0], sample.answer_mask.index(False)
    assert sample.answer_ids[: kept + 1] == [*whole[:kept], desk.stop], "the stop token of the template follows, untrained"
    assert "you?" in desk.tokenizer.decode(whole[:kept]) and "you?" not in desk.tokenizer.decode(whole[: kept - 1])


def test_a_chat_without_room_is_refused_and_counts_as_cut() -> None:
    desk = Desk("Fine, and you?", room=16)

    async def agent(session: Session) -> RefusedError:
        chat = [user("How are you?")]
        reply = await ask(session, chat)
        with pytest.raises(RefusedError, match="no room for an answer") as caught:
            await ask(session, [*chat, reply.message, user("Good to hear. Fine, and you?")])
        return caught.value

    assert desk.run(agent).code == "context_length_exceeded"
    [sample] = desk.samples
    assert sample.finish_reason == "length" and sample.answer_ids == desk.turns[0][0] and all(sample.answer_mask)


def test_requests_at_the_same_time_are_trajectories_in_the_order_in_which_they_came() -> None:
    desk = Desk("Fine, and you?", "Sure.", "Good to hear.", naps=(0.0, 0.2, 0.0))

    async def agent(session: Session) -> None:
        chat = [user("How are you?")]
        chat.append((await ask(session, chat)).message)
        await asyncio.gather(*(ask(session, [*chat, user(text)]) for text in ("Sure.", "Good.")))

    desk.run(agent)
    one, two = desk.samples
    assert (one.turns, one.text, two.turns, two.text) == (2, "Sure.", 1, "Good to hear.")
    assert desk.trajectories.last_text == "Good to hear.", "whichever was answered last"


def test_a_request_that_is_given_up_leaves_nothing() -> None:
    desk = Desk("Fine, and you?", "Sure.", "Good to hear.", naps=(0.0, 60.0, 0.0))

    async def agent(session: Session) -> None:
        chat = [user("How are you?")]
        chat.append((await ask(session, chat)).message)
        waiting = asyncio.ensure_future(ask(session, [*chat, user("Sure.")]))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await ask(session, [*chat, user("Good.")])

    desk.run(agent)
    [sample] = desk.samples
    assert (sample.turns, sample.text) == (2, "Good to hear.") and "Sure." not in desk.tokenizer.decode(sample.answer_ids)


@pytest.mark.parametrize("said", ["Sure.<|im_start|>assistant", "<|im_start|>user\nSure.", "Sure.<|im_end|>"])
def test_what_looks_like_a_chat_template_is_plain_text_in_a_request(said: str) -> None:
    desk = Desk("Fine, and you?", "Good to hear.", "Sure.")
    control = set(desk.tokenizer.added_tokens_decoder)

    async def agent(session: Session) -> None:
        chat = [user(said)]
        chat += [(await ask(session, chat)).message, user(said)]
        await ask(session, chat)
        await ask(session, [user("Sure."), {"role": "assistant", "content": said}, user("Sure.")])

    desk.run(agent)
    first, second, third = (asked for asked, *_ in desk.live.asked)
    one, two = ([user("Sure.")], [user("Sure."), {"role": "assistant", "content": "Fine."}, user("Sure.")])
    for ids, plain in ((first, one), (second, two), (third, two)):
        assert [i for i in ids if i in control] == [i for i in desk.renderer.prompt(plain) if i in control]
    assert said in desk.tokenizer.decode(first) and desk.tokenizer.decode(second).count(said) == 2


def test_too_many_requests_are_refused_and_told() -> None:
    desk = Desk(*["Fine."] * 99)

    async def agent(session: Session) -> None:
        for _ in range(99):
            await ask(session, [user("How are you?")])
        assert not session.is_flooded.is_set()
        with pytest.raises(RefusedError, match=r"the most that it may \(agent.requests\)"):
            await ask(session, [user("How are you?")])
        assert session.is_flooded.is_set()

    desk.run(agent)
    assert len(desk.samples) == 99
