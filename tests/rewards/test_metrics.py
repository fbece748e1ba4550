"""The metrics of short answers, options, patterns and word overlap, against implementations that others wrote."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from verl.config.commands import EvalConfig
from verl.config.load import load_config
from verl.errors import UserError
from verl.rewards import choice, exact, f1, regex, rouge
from verl.rewards._words import words_of

TEXTS = [
    "Paris",
    "paris",
    "Paris.",
    "the city of Paris",
    "St. John's",
    "st johns",
    "a cat and the other cat",
    "A cat, and another cat!",
    "1,000",
    "1000",
    "$12.50",
    "state-of-the-art",
    "state of the art",
    "Über den Wolken",
]
ENGLISH = [
    "The quick brown fox jumps over the lazy dog",
    "A quick fox jumped over two lazy dogs.",
    "the dog is lazy; the fox isn't",
    "Foxes jump. Dogs sleep.\nBirds fly.",
    "Nothing in common",
    "1,000 foxes (quick)",
]
CHINESE = ["北京是中国的首都", "中国的首都是北京。", "上海", "首都：北京", "北京 is the capital，对吧？", "首都，北京，中国"]


def row(reference: str) -> dict[str, Any]:
    return {"reference": reference}


# exact


@pytest.mark.parametrize("ignore_case", [False, True])
@pytest.mark.parametrize("ignore_punctuation", [False, True])
def test_exact_match_is_that_of_the_evaluation_harness(ignore_case: bool, ignore_punctuation: bool) -> None:
    metrics = pytest.importorskip("lm_eval.api.metrics")
    settings = exact.Settings(ignore_case, ignore_punctuation)
    for text in TEXTS:
        for reference in TEXTS:
            expected = metrics.exact_match_hf_evaluate([text], [reference], ignore_case=ignore_case, ignore_punctuation=ignore_punctuation)
            assert exact.score("", text, row(reference), settings) == expected["exact_match"], (text, reference)


def test_an_exact_answer_may_have_white_space_thoughts_and_a_mark() -> None:
    plain = exact.Settings()
    for text in (" New  York\n", "<think>Boston? No.</think>\nNew York", "The city is big.\n#### New York\n", "New York"):
        assert exact.score("", text, row("New York"), plain) == 1.0
    for text in ("new york", "New York.", "It is New York", "", "<think>New York</think>"):
        assert exact.score("", text, row("New York"), plain) == 0.0
    assert exact.exact_match("new york!", "New York", "flexible", plain) and not exact.exact_match("York", "New York", "flexible", plain)
    assert exact.extract_answer("  \n", plain) is None


# choice


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. Paris", "B"),
        ("B) Paris", "B"),
        ("**B**", "B"),
        ("The answer is (B).", "B"),
        ("The answer is B because A is too small.", "B"),
        ("Let us see. A) is wrong, C) too.\nAnswer: B", "B"),
        ("A) is wrong.\nC is wrong too.\n\nB", "B"),
        (r"So the answer is $\boxed{\text{B}}$", "B"),
        ("reasons\n#### B", "B"),
        ("答案：B", "B"),
        ("因此选B。", "B"),
        ("（Ｂ）", "B"),
        ("<think>maybe A</think>B", "B"),
        ("The correct option is J", "J"),
        ("A cat", None),
        ("I think so", None),
        ("Because it is late", None),
        ("the answer is a cat", None),
        ("", None),
        ("K", None),
        ("U.S. law", None),
    ],
)
def test_the_letter_of_an_option_is_found(text: str, letter: str | None) -> None:
    assert choice.extract_answer(text, choice.Settings()) == letter


def test_answers_in_the_format_of_published_evaluations_are_read_as_they_read_them() -> None:
    """Openai's simple-evals reads `Answer: $LETTER`, MMLU-Pro `answer is (LETTER)`: with these patterns."""
    import re

    for text in (
        "Because of x.\n\nAnswer: C",
        "Answer: $C",
        "answer:C",
        "Answer: c",
        "Hence the answer is (C).",
        "So the answer is C",
        "The answer is (C) 12",
    ):
        published = re.search(r"(?i)Answer[ \t]*:[ \t]*\$?([A-D])\$?", text) or re.search(r"answer is \(?([A-J])\)?", text)
        assert choice.extract_answer(text, choice.Settings()) == published[1].upper()


def test_a_choice_is_right_if_it_names_the_same_option() -> None:
    plain = choice.Settings()
    assert choice.score("", "Answer: (b)", row("B"), plain) == choice.score("", "b", row("B)"), plain) == 1.0
    assert choice.score("", "The answer is (C).", row("B) Paris"), plain) == 0.0
    assert choice.exact_match("It could be A. More likely it is C, I guess", "C", "flexible", plain)
    assert not choice.exact_match("A dog", "A", "flexible", plain)
    assert choice.extract_answer("E", choice.Settings(letters="ABCD")) is None
    with pytest.raises(UserError, match="letters: 'ab' are not different capital letters"):
        choice.Settings(letters="ab").check()


# regex


@pytest.mark.parametrize("which", ["first", "last"])
@pytest.mark.parametrize("pattern", [r"#### (\-?[0-9\.\,]+)", r"\d+", r"(?:is|be) (\w+)|(\d+)", r"x*"])
def test_a_pattern_finds_what_the_evaluation_harness_finds(pattern: str, which: str) -> None:
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    texts = ["3 and 4\n#### 7", "#### -1,200.5 or #### 8", "it is late, 5", "no", "", "12", "can be\n2"]
    found = extraction.RegexFilter(pattern, group_select=0 if which == "first" else -1, fallback="").apply([[text] for text in texts], [])
    settings = regex.Settings(pattern, which)
    assert [regex.extract_answer(text, settings) or "" for text in texts] == [text for (text,) in found]


def test_a_reference_is_read_by_the_pattern_or_taken_whole() -> None:
    settings = regex.Settings(r"Label: (\w+)")
    assert regex.score("", "I say\nLabel: Positive", row("positive"), settings) == 0.0
    assert regex.exact_match("Label: Positive", "positive", "flexible", settings)
    assert regex.score("", "Label: positive", row("Label: positive"), settings) == 1.0
    assert regex.score("", "positive", row("positive"), settings) == 0.0
    assert regex.needs_limit(settings)


def eval_words(*words: str) -> list[str]:
    return ["model_path=m", "test_file=t.jsonl", "output_dir=o", *words]


def test_a_pattern_is_checked_before_anything_else() -> None:
    assert load_config(EvalConfig, eval_words("metric=regex", r"reward.pattern=Label: (\w+)")).reward.pattern == r"Label: (\w+)"  # type: ignore[attr-defined]
    for words, said in (
        ([], "reward.pattern: metric regex needs a pattern"),
        (["reward.pattern=(a"], r"reward.pattern: '\(a' is not a regular expression"),
        (["reward.pattern=a", "reward.pattern_match=second"], "reward.pattern_match: found 'second'"),
    ):
        with pytest.raises(UserError, match=said):
            load_config(EvalConfig, eval_words("metric=regex", *words))


# Word overlap


@pytest.mark.parametrize(("language", "texts"), [("en", [*TEXTS, *ENGLISH]), ("zh", CHINESE)])
def test_the_f1_score_is_that_of_the_evaluation_script_of_mlqa(language: str, texts: list[str]) -> None:
    """MLQA's is SQuAD's for English, and compares Chinese by character."""
    mlqa = pytest.importorskip("lm_eval.tasks.mlqa.utils")
    for text in texts:
        for reference in texts:
            if language == "zh" and " the " in text + reference:
                continue  # an English article in a Chinese text stays a word there
            assert f1.score("", text, row(reference)) == pytest.approx(mlqa.f1_score(text, reference, language)), (text, reference)


def test_texts_without_words_are_equal_only_to_each_other() -> None:
    assert f1.score("", "...", row("the")) == 1.0 and f1.score("", "", row("cat")) == 0.0
    assert f1.score("", "<think>cat cat</think>dog", row("cat")) == 0.0


@pytest.mark.parametrize("kind", rouge.KINDS)
@pytest.mark.parametrize("stemmer", [False, True])
def test_rouge_of_english_is_that_of_rouge_score(kind: str, stemmer: bool) -> None:
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_scorer.RougeScorer([kind], use_stemmer=stemmer)
    for text in ENGLISH:
        for reference in ENGLISH:
            expected = scorer.score(reference, text)[kind].fmeasure
            assert rouge.score("", text, row(reference), rouge.Settings(kind, stemmer)) == pytest.approx(expected), (text, reference)


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL"])
def test_rouge_of_chinese_is_that_of_its_characters(kind: str) -> None:
    """rouge-score's own tokenizer sees no Chinese. With an English word in the place of each character it gives what it should give."""
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_scorer.RougeScorer([kind])
    texts = [text for text in CHINESE if text.isascii() or " " not in text]

    def spelled(text: str) -> str:
        return " ".join(f"w{ord(character)}" for character in text if character not in "。：，？")

    scores = []
    for text in texts:
        for reference in texts:
            scores.append(rouge.score("", text, row(reference), rouge.Settings(kind)))
            assert scores[-1] == pytest.approx(scorer.score(spelled(reference), spelled(text))[kind].fmeasure), (text, reference)
    assert scorer.score(texts[0], texts[1])[kind].fmeasure == 0.0 and 0 < np.mean(scores) < 1


def test_words_are_split_as_documented() -> None:
    assert words_of("Don't stop, 北京 is Großartig") == ["dont", "stop", "北", "京", "is", "großartig"]
    assert words_of("東京タワーへ") == ["東", "京", "タ", "ワ", "ー", "へ"]
    assert words_of("한국어 텍스트") == ["한국어", "텍스트"]
    assert words_of("ภาษาไทย") == ["ภ", "า", "ษ", "า", "ไ", "ท", "ย"]
    assert words_of("ＡＢＣ１２") == ["abc12"]


def test_rouge_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    rouge.check_installed.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"rouge-score is not installed\n  fix: pip install"):
        rouge.score("", "a", row("a"), rouge.Settings())
    rouge.check_installed.cache_clear()
    with pytest.raises(UserError, match=r"reward\.rouge: found 'rouge3'"):
        load_config(EvalConfig, eval_words("metric=rouge", "reward.rouge=rouge3"))


def test_the_new_metrics_are_files_that_reinforcement_learning_can_use_too() -> None:
    folder = Path(choice.__file__).parent
    assert all((folder / f"{name}.py").is_file() for name in ("exact", "choice", "regex", "f1", "rouge", "judge"))
