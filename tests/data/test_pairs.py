"""Pairs of answers, in each form that preference data has, to two documents a row."""

import json
import re
from pathlib import Path
from typing import Any

import families
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from places import ROOT, SHARED
from pyarrow import parquet
from transformers import AutoTokenizer

from verl.config.load import load_config
from verl.config.pairs import PairsConfig, RewardTrainerConfig
from verl.data.documents import NOTHING_TRAINED, SAME_ANSWERS, Documents, load_documents
from verl.data.labelled import LabelColumns, load_labelled
from verl.data.loader import Packing, micro_batches
from verl.data.pairs import PairColumns
from verl.data.render import Renderer
from verl.errors import UserError

QWEN = SHARED / "models" / "qwen2.5"

ASKED = {"role": "user", "content": "What is 2 + 3?"}
RIGHT, WRONG = {"role": "assistant", "content": "It is 5."}, {"role": "assistant", "content": "It is 6, I am sure."}
FORMS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": ASKED["content"], "chosen": RIGHT["content"], "rejected": WRONG["content"]},
    "text and messages": {"prompt": ASKED["content"], "chosen": [RIGHT], "rejected": [WRONG]},
    "messages and text": {"prompt": [ASKED], "chosen": RIGHT["content"], "rejected": WRONG["content"]},
    "messages": {"prompt": [ASKED], "chosen": [RIGHT], "rejected": [WRONG]},
    "whole chats": {"chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]},
    "whole chats as text": {
        "chosen": "\n\nHuman: What is 2 + 3?\n\nAssistant: It is 5.",
        "rejected": "\n\nHuman: What is 2 + 3?\n\nAssistant: It is 6, I am sure.",
    },
    "whole chats beside the prompt": {"prompt": "What is 2 + 3?", "chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]},
    "whole chats beside the same messages": {"prompt": [ASKED], "chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]},
    "whole chats beside an empty prompt": {"prompt": [], "chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]},
    "whole chats as JSON": {"prompt": "What is 2 + 3?", "chosen": json.dumps([ASKED, RIGHT]), "rejected": json.dumps([ASKED, WRONG])},
    "messages as JSON": {"prompt": json.dumps([ASKED]), "chosen": json.dumps([RIGHT]), "rejected": json.dumps(WRONG, indent=1)},
    "single messages": {"prompt": ASKED, "chosen": RIGHT, "rejected": WRONG},
    "one chat and one text": {"prompt": "What is 2 + 3?", "chosen": [ASKED, RIGHT], "rejected": WRONG["content"]},
    "a prompt that ends with the speaker": {
        "prompt": "\n\nHuman: What is 2 + 3?\n\nAssistant:",
        "chosen": " It is 5.",
        "rejected": [WRONG],
    },
    "lists of one text": {"prompt": ["What is 2 + 3?"], "chosen": ["It is 5."], "rejected": ["It is 6, I am sure."]},
    "LLaMA-Factory's messages": {
        "conversations": [{"from": "human", "value": "What is 2 + 3?"}],
        "chosen": {"from": "gpt", "value": "It is 5."},
        "rejected": {"from": "gpt", "value": "It is 6, I am sure."},
    },
    "LLaMA-Factory's texts": {
        "conversations": [{"from": "human", "value": "What is 2 + 3?"}],
        "chosen": "It is 5.",
        "rejected": "It is 6, I am sure.",
    },
    "a chat of messages and lists of one message": {"messages": [ASKED], "chosen": [RIGHT], "rejected": json.dumps([WRONG])},
    "roles under other names": {
        "prompt": [ASKED],
        "chosen": {"from": "ChatGPT", "value": "It is 5."},
        "rejected": {"role": "AI", "content": "It is 6, I am sure."},
    },
    "chats as text beside the prompt": {
        "prompt": "What is 2 + 3?",
        "chosen": "Human: What is 2 + 3?\n\nAssistant: It is 5.",
        "rejected": "Human: What is 2 + 3?\n\nAssistant: It is 6, I am sure.",
    },
}


def load(tmp_path: Path, rows: list[dict[str, Any]], *, tokenizer: Any = None, **keys: Any) -> Documents:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PairsConfig(train_files=str(file), cache_dir=str(tmp_path / "cache"), **keys)
    return load_documents(config, PairColumns.of(config), config.train_files, tokenizer or families.chatml())


def trained(documents: Documents, index: int) -> str:
    ids, mask = documents.document(index)
    return str(families.chatml().decode(ids[mask].tolist()))


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_every_form_gives_the_chosen_chat_and_the_rejected_one(row: dict[str, Any], tmp_path: Path) -> None:
    pairs = load(tmp_path, [row])
    assert len(pairs) == 1 and len(pairs.lengths_N) == 2
    for index, answer in enumerate((RIGHT, WRONG)):
        expected = Renderer(families.chatml()).chat([ASKED, answer])
        ids, mask = pairs.document(index)
        assert ids.tolist() == expected.input_ids and mask.tolist() == expected.loss_mask
        assert trained(pairs, index) == f"{answer['content']}<|im_end|>"


def examples(heading: str) -> list[list[dict[str, Any]]]:
    """The rows of each example under a heading of docs/data.md."""
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    section = page.partition(f"\n{heading}\n")[2].partition("\n## ")[0]
    return [[json.loads(line) for line in block.splitlines()] for block in re.findall(r"```jsonl\n(.*?)```", section, re.DOTALL)]


def test_the_examples_of_the_documentation_are_read_as_it_says(tmp_path: Path) -> None:
    chats, texts, with_margin, labelled = examples("## Pairs of answers")
    pairs = load(tmp_path, chats)
    assert len(pairs) == len(chats) == 11
    for number in range(2 * len(chats)):
        answer = "It is 6." if number % 2 else "It is 5."
        expected = Renderer(families.chatml()).chat([ASKED, {"role": "assistant", "content": answer}])
        assert pairs.document(number)[0].tolist() == expected.input_ids and trained(pairs, number) == f"{answer}<|im_end|>"
    assert len(load(tmp_path, texts, prompt_key=None)) == 1 and len(load(tmp_path, with_margin)) == 1
    with pytest.raises(UserError, match="one answer with a label"):
        load(tmp_path, labelled)
    file = tmp_path / "labelled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in labelled))
    config = PairsConfig(cache_dir=str(tmp_path / "cache"))
    assert load_labelled(config, LabelColumns(), str(file), families.chatml()).is_good_N.tolist() == [True, False]


def test_turns_that_both_chats_have_are_context(tmp_path: Path) -> None:
    before = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello to you"}, ASKED]
    pairs = load(tmp_path, [{"chosen": [*before, RIGHT], "rejected": [*before, WRONG, ASKED, WRONG]}])
    assert trained(pairs, 0) == "It is 5.<|im_end|>"
    assert trained(pairs, 1) == "It is 6, I am sure.<|im_end|>" * 2


def test_a_chat_as_text_may_have_several_turns_with_paragraphs_in_them(tmp_path: Path) -> None:
    text = "\n\nHuman: Hello\n\nAssistant: Hello to you.\n\nAsk me.\n\nHuman: What is 2 + 3?\n\nAssistant: "
    pairs = load(tmp_path, [{"chosen": text + RIGHT["content"], "rejected": text + WRONG["content"]}])
    said = families.chatml().decode(pairs.document(0)[0].tolist())
    assert "assistant\nHello to you.\n\nAsk me.<|im_end|>" in said and "user\nWhat is 2 + 3?<|im_end|>" in said
    assert [trained(pairs, index) for index in (0, 1)] == [f"{answer['content']}<|im_end|>" for answer in (RIGHT, WRONG)]


SYSTEM, HELLO, HI = {"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}


@pytest.mark.parametrize(
    "prompt",
    [None, "Hello", "What is 2 + 3? ", [SYSTEM, HELLO, HI, ASKED], [HELLO, HI, ASKED], [SYSTEM], json.dumps([HELLO])],
    ids=["none", "the first question", "the last question", "all", "all but the system message", "the system message", "JSON"],
)
def test_a_prompt_may_repeat_any_part_of_the_beginning(prompt: Any, tmp_path: Path) -> None:
    before = [SYSTEM, HELLO, HI, ASKED]
    pairs = load(tmp_path, [{"prompt": prompt, "chosen": [*before, RIGHT], "rejected": [*before, WRONG]}])
    for index, answer in enumerate((RIGHT, WRONG)):
        assert pairs.document(index)[0].tolist() == Renderer(families.chatml()).chat([*before, answer]).input_ids
        assert trained(pairs, index) == f"{answer['content']}<|im_end|>"


@pytest.mark.parametrize(
    "prompt", ["What is 2 + 4?", [HELLO], [SYSTEM, HELLO], [ASKED, RIGHT], "Human: Hello\n\nAssistant: Hi\n\nHuman: What is 2 + 3?"]
)
def test_a_prompt_that_contradicts_the_chats_is_refused(prompt: Any, tmp_path: Path) -> None:
    row = {"prompt": prompt, "chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]}
    with pytest.raises(UserError, match=r"jsonl:1: column 'prompt' says .* but the chat begins with 'What is 2 \+ 3\?'") as caught:
        load(tmp_path, [row])
    assert "data.prompt_key=null" in str(caught.value.fix)
    assert trained(load(tmp_path, [row], prompt_key=None), 0) == "It is 5.<|im_end|>"  # as the fix says


CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}],
}
RESULT = {"role": "tool", "content": "5"}
ADD = {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("as_text", [False, True])
def test_chats_may_call_tools_before_and_after_they_part(as_text: bool, tmp_path: Path) -> None:
    before, tokenizer = [ASKED, CALL, RESULT], families.qwen3()
    row: dict[str, Any] = {"prompt": [ASKED], "chosen": [CALL, RESULT, RIGHT], "rejected": [*before, WRONG], "tools": [ADD]}
    pairs = load(tmp_path, [{k: json.dumps(v) for k, v in row.items()} if as_text else row], tokenizer=tokenizer, tools_key="tools")
    for index, answer in enumerate((RIGHT, WRONG)):
        ids, mask = pairs.document(index)
        assert ids.tolist() == Renderer(tokenizer).chat([*before, answer], [ADD]).input_ids
        assert answer["content"] in str(tokenizer.decode(ids[mask])) and "add" not in str(tokenizer.decode(ids[mask]))
    apart = load(tmp_path, [{"chosen": [*before, RIGHT], "rejected": [ASKED, WRONG]}], tokenizer=tokenizer)
    ids, mask = apart.document(0)
    assert "add" in str(tokenizer.decode(ids[mask])) and "It is 5." in str(tokenizer.decode(ids[mask]))


@pytest.mark.parametrize("form", ["texts", "whole chats", "messages"])
def test_a_system_prompt_in_a_column_of_its_own_is_read_and_said(form: str, tmp_path: Path) -> None:
    documents = load(tmp_path, [{**FORMS[form], "system": "Be short."}])
    assert "the system prompt is in column 'system': 1 row" in str(documents.report)
    tokenizer = families.chatml()
    assert all("Be short." in tokenizer.decode(documents.document(index)[0]) for index in (0, 1))


def test_a_prompt_whose_system_message_the_chats_leave_out_is_refused(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "system", "content": "Be short."}, ASKED], "chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]}
    with pytest.raises(UserError, match="begins with a system message, which the chats leave out"):
        load(tmp_path, [row])


def test_tools_that_the_model_would_not_see_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"jsonl:1: column 'tools' has tools, but data.tools_key is not set"):
        load(tmp_path, [{**FORMS["whole chats"], "tools": [ADD]}])
    assert len(load(tmp_path, [{**FORMS["whole chats"], "tools": None}])) == 1


@pytest.mark.parametrize("answer", ['["a", "b"]', '[{"name": "Ann"}]', '{"role": 5}'[:4], "[1, 2", "{x}"])
def test_an_answer_may_be_json_that_is_no_chat(answer: str, tmp_path: Path) -> None:
    assert trained(load(tmp_path, [{**FORMS["texts"], "chosen": answer}]), 0) == f"{answer}<|im_end|>"


def test_beside_a_prompt_an_answer_is_no_chat_whatever_it_says(tmp_path: Path) -> None:
    pairs = load(tmp_path, [{**FORMS["texts"], "chosen": "Human: 5"}])
    assert trained(pairs, 0) == "Human: 5<|im_end|>"


WHOLE = {
    "words": ("What is 2 + 3? It is 5.", "What is 2 + 3? It is 6, I am sure."),
    "a part of a word": ("Is it nice?\nIt is unkind.", "Is it nice?\nIt is unhappy."),
    "the beginning of the other": ("Count: 1, 2", "Count: 1, 2, 3"),
    "paragraphs": ("Hello.\n\nA: I am here.\n\nB: So am I.", "Hello.\n\nA: I am here.\n\nB: Are you?"),
    "other letters": ("Größe: 5 Äpfel", "Größe: 6 Äpfel"),
}


@pytest.mark.parametrize("make", [families.chatml, families.llama3])
@pytest.mark.parametrize("texts", WHOLE.values(), ids=WHOLE)
def test_of_whole_texts_the_tokens_that_both_begin_with_are_context(texts: tuple[str, str], make: Any, tmp_path: Path) -> None:
    tokenizer = make()
    pairs = load(tmp_path, [dict(zip(("chosen", "rejected"), texts, strict=True))], tokenizer=tokenizer, prompt_key=None)
    contexts, answers = [], []
    for index, text in enumerate(texts):
        ids, mask = pairs.document(index)
        contexts.append(ids[: int(mask.argmax())].tolist())
        answers.append(ids[mask].tolist())
        assert [*contexts[-1], *answers[-1]] == ids.tolist(), "one run of trained tokens"
        assert tokenizer.decode(ids[:-1], skip_special_tokens=True) == text and ids[-1] == tokenizer.eos_token_id
    assert contexts[0] == contexts[1] and contexts[0] and answers[0][0] != answers[1][0]


@pytest.mark.parametrize("texts", [WHOLE[name] for name in ("words", "paragraphs", "other letters", "a part of a word")])
def test_whole_texts_part_where_trl_parts_them(texts: tuple[str, str], tmp_path: Path) -> None:
    extract_prompt = pytest.importorskip("trl.data_utils", reason="trl is not installed").extract_prompt
    common_prefix_length = pytest.importorskip("trl.trainer.dpo_trainer").common_prefix_length
    if not QWEN.is_dir():
        pytest.skip(f"no tokenizer in {QWEN}")
    tokenizer = AutoTokenizer.from_pretrained(QWEN)
    row = dict(zip(("chosen", "rejected"), texts, strict=True))
    pairs, expected = load(tmp_path, [row], tokenizer=tokenizer, prompt_key=None), extract_prompt(dict(row))
    for index, name in enumerate(("chosen", "rejected")):
        ids, mask = pairs.document(index)
        # TRL's trainer takes of the prompt what is whole tokens in both texts.
        prompt = tokenizer(expected["prompt"]).input_ids
        whole = tokenizer(expected["prompt"] + expected[name]).input_ids
        context = min(common_prefix_length(prompt, tokenizer(text).input_ids) for text in texts)
        assert ids.tolist() == [*whole, tokenizer.eos_token_id] and context > 0
        # It leaves a space to the answers; where that is a token of its own both have it, and no difference between them does.
        assert tokenizer.decode(ids[context : mask.argmax()]) in ("", " ")


def test_beside_whole_texts_there_may_be_chats_and_pairs_that_are_the_same(tmp_path: Path) -> None:
    whole = dict(zip(("chosen", "rejected"), WHOLE["words"], strict=True))
    pairs = load(
        tmp_path, [FORMS["whole chats as text"], {**whole, "rejected": whole["chosen"]}, FORMS["whole chats"], whole], prompt_key=None
    )
    assert len(pairs) == 3 and pairs.report.dropped == {SAME_ANSWERS: 1}
    assert trained(pairs, 0) == trained(pairs, 2) == "It is 5.<|im_end|>"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": "It is 5.", "rejected": "No, 6."}, r"jsonl:1: the texts have no common beginning"),
        ({"chosen": "It is 5.", "rejected": "  "}, r"jsonl:1: column 'rejected' is empty"),
        ({"chosen": "It is 5.", "rejected": [WRONG]}, r"jsonl:1: data.prompt_key=null: an answer without its prompt"),
        ({"chosen": "Human: a?\n\nAssistant: b", "rejected": "a? c"}, r"an answer without its prompt(.|\n)*name the prompt column"),
    ],
)
def test_whole_texts_that_are_no_pair_are_an_error_at_their_place(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        load(tmp_path, [row], prompt_key=None)


def test_pairs_stay_together_in_a_micro_batch_chosen_first(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "chosen": "yes " * (i + 1), "rejected": f"no {i}"} for i in range(9)]
    pairs = load(tmp_path, rows)
    batches = micro_batches(pairs, np.arange(9)[::-1], Packing(1, 120))
    numbers = [batch.sample_ids_S.reshape(-1, 2) for batch in batches]
    assert len(batches) > 1 and all((pair[:, 0] % 2 == 0).all() and (pair[:, 1] == pair[:, 0] + 1).all() for pair in numbers)
    assert sorted(np.concatenate(numbers)[:, 0] // 2) == list(range(9))


def test_values_of_documents_go_with_them_into_the_batch(tmp_path: Path) -> None:
    from dataclasses import replace

    pairs = load(tmp_path, [FORMS["texts"], FORMS["whole chats"]])
    values = [np.full(tokens, index, dtype=np.float32) for index, tokens in enumerate(pairs.trained_N)]
    (batch,) = micro_batches(replace(pairs, values={"ref_logprob_M": values}), np.array([1, 0]), Packing(1, 1000))
    assert batch.ref_logprob_M is not None and batch.sample_ids_S.tolist() == [2, 3, 0, 1]
    assert batch.ref_logprob_M.tolist() == np.repeat([2, 3, 0, 1], pairs.trained_N[[2, 3, 0, 1]]).tolist()


def test_equal_answers_and_answers_that_are_cut_off_are_left_out_and_counted(tmp_path: Path) -> None:
    same, long = {**FORMS["texts"], "rejected": RIGHT["content"]}, {**FORMS["texts"], "prompt": "why? " * 50}
    pairs = load(tmp_path, [same, FORMS["texts"], long], max_length=40, truncation="right")
    assert len(pairs) == 1 and pairs.place(1) == f"{tmp_path}/pairs.jsonl:2"
    assert pairs.report.read == 3 and pairs.report.dropped == {SAME_ANSWERS: 1, NOTHING_TRAINED: 1}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "?", "chosen": "a", "rejected": "b"}, r"jsonl:1: column 'prompt' is missing(.|\n)*data.prompt_key"),
        ({"chosen": "It is 5.", "rejected": "It is 6."}, r"column 'prompt' is missing(.|\n)*whole texts, data.prompt_key=null"),
        ({"chosen": "Human: a?\n\nAssistant: b", "rejected": "Human: c?\n\nAssistant: b"}, "do not begin with the same message"),
        ({"chosen": "Human: a?\n\nAssistant:", "rejected": "Human: a?\n\nAssistant: b"}, r"jsonl:1: chosen: messages\[1\]"),
        ({"prompt": "?", "chosen": "a"}, r"column 'rejected' is missing(.|\n)*data.rejected_key"),
        ({"prompt": "?", "chosen": True, "rejected": "b"}, "column 'chosen' is a boolean"),
        ({"prompt": "?", "chosen": "", "rejected": "b"}, "column 'chosen' is empty"),
        ({"chosen": [ASKED, RIGHT], "rejected": [{**ASKED, "content": "?"}, WRONG]}, "do not begin with the same message"),
        (
            {"prompt": "?", "chosen": "[{'role': 'assistant', 'content': 'b'}]", "rejected": "b"},
            r"jsonl:1: chosen: the chat is text that is not JSON",
        ),
        (
            {"prompt": "?", "chosen": [1, 2], "rejected": "b"},
            r"jsonl:1: chosen: found a list \(\[1, 2\]\), expected text or a list of messages",
        ),
        ({"prompt": [ASKED, RIGHT], "chosen": "a", "rejected": "b"}, "jsonl:1: prompt: the prompt ends with the assistant's turn"),
        ({"prompt": "?", "completion": "a", "label": True}, "jsonl:1: the row is one answer with a label"),
        (
            {"chosen": [HELLO, HI, ASKED, RIGHT], "rejected": [HELLO, HI, HELLO, WRONG]},
            r"chosen: messages\[2\]: .* part at a message of the user",
        ),
        ({"chosen": [HELLO, HI, ASKED, RIGHT], "rejected": [HELLO, HI, WRONG]}, r"messages\[2\]: .* part at a message of the user"),
        (
            {"chosen": [ASKED, CALL, RESULT, RIGHT], "rejected": [ASKED, CALL, {**RESULT, "content": "6"}, WRONG]},
            "part at a message of the tool",
        ),
        (
            {"chosen": [HELLO, HI, ASKED], "rejected": [HELLO, RIGHT, ASKED]},
            r"chosen: messages\[2\]: the chat ends with a message of the user",
        ),
        ({"chosen": [HELLO, HI, ASKED, RIGHT], "rejected": [HELLO, HI, ASKED, RIGHT, HELLO]}, r"rejected: messages\[4\]: the chat ends"),
        ({"chosen": [HELLO, HI], "rejected": [HELLO, HI, ASKED, WRONG]}, "jsonl:1: one chat is the beginning of the other"),
        ({"chosen": [ASKED, RIGHT], "rejected": [ASKED, {"role": "robot", "content": "b"}]}, r"jsonl:1: rejected: messages\[1\]"),
        ({"chosen": [ASKED], "rejected": [ASKED, WRONG]}, r"jsonl:1: chosen: messages\[0\]: the chat ends with a message of the user"),
    ],
)
def test_a_row_that_is_no_pair_is_an_error_at_its_place(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        load(tmp_path, [row])


def test_pairs_that_are_all_equal_are_not_blamed_on_their_length(tmp_path: Path) -> None:
    same = {**FORMS["texts"], "rejected": RIGHT["content"]}
    with pytest.raises(UserError, match="2 with two equal answers") as caught:
        load(tmp_path, [same, {**FORMS["whole chats"], "rejected": FORMS["whole chats"]["chosen"]}])
    assert caught.value.fix == "give each row two different answers (data.chosen_key, data.rejected_key)"
    with pytest.raises(UserError, match="1 with two answers that are equal up to data") as cut:
        load(tmp_path, [{**FORMS["texts"], "chosen": "five " * 40, "rejected": "five " * 50}], max_length=30, truncation="right")
    assert "raise data.max_length above 30" in str(cut.value.fix)


def test_one_column_cannot_be_both_answers() -> None:
    with pytest.raises(UserError, match="is the column of both answers"):
        load_config(RewardTrainerConfig, ["data.train_files=a", "model.partial_pretrain=m", "data.rejected_key=chosen"])


def test_a_pair_with_a_long_answer_is_an_error_that_counts_rows(tmp_path: Path) -> None:
    rows = [FORMS["texts"], {**FORMS["texts"], "chosen": "five " * 90, "rejected": "six " * 90}]
    with pytest.raises(UserError, match=r"1 of 2 rows are longer than data.max_length=60"):
        load(tmp_path, rows, max_length=60)


def test_the_chat_that_is_the_prompt_is_said(tmp_path: Path) -> None:
    said = str(load(tmp_path, [FORMS["LLaMA-Factory's texts"]]).report)
    assert "the prompt is the chat in 'conversations': 1 row" in said


def test_earlier_turns_and_the_system_prompt_of_llama_factory_are_context(tmp_path: Path) -> None:
    before = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}, {"from": "human", "value": "What is 2 + 3?"}]
    pairs = load(tmp_path, [{"system": "Be short.", "conversations": before, "chosen": "It is 5.", "rejected": "It is 6."}])
    assert trained(pairs, 0) == "It is 5.<|im_end|>" and trained(pairs, 1) == "It is 6.<|im_end|>"
    assert all(text in families.chatml().decode(pairs.document(1)[0]) for text in ("Be short.", "Hello", "Hi"))


def test_a_chat_that_is_answered_already_is_no_prompt(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'prompt' is missing \(found: conversations, chosen, rejected\)"):
        load(tmp_path, [{"conversations": [ASKED, RIGHT], "chosen": "It is 5.", "rejected": "It is 6."}])


def test_pairs_in_parquet_are_read_with_what_stands_beside_them(tmp_path: Path) -> None:
    rows = [{"conversations": [ASKED], "chosen": RIGHT, "rejected": WRONG, "system": "Be short.", "other": "x"}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    config = PairsConfig(train_files=str(tmp_path / "pairs.parquet"), cache_dir=str(tmp_path / "cache"))
    pairs = load_documents(config, PairColumns.of(config), config.train_files, families.chatml())
    assert trained(pairs, 0) == "It is 5.<|im_end|>" and "Be short." in families.chatml().decode(pairs.document(0)[0])
