"""Files that are not UTF-8 are read if that is certain; otherwise an error says what they are."""

import gzip
import json
import re
from pathlib import Path

import pytest

from verl.data.source import read_rows
from verl.errors import UserError

ROW = {"question": "1 + 1?", "answer": "zwei, naïve “2” 你好 🙂"}
TEXTS = {
    "gb18030": "中国的首都是哪里？,北京。",
    "gbk": "天空为什么是蓝色的？,因为瑞利散射。",
    "big5": "中國的首都是哪裡？,北京。",
    "shift_jis": "日本の首都はどこですか？,東京です。",
    "euc_kr": "한국의 수도는 어디입니까?,서울입니다.",
    "cp1252": "Où est le café ?,Près de l’église – tout droit.",
    "latin-1": "Où est le café ?,Près de la forêt à droite.",
    "cp1251": "Какая столица России?,Москва.",
    "koi8-r": "Какая столица России?,Москва.",
    "euc_jp": "日本の首都はどこですか？,東京です。",
}
MORE = {
    "gb18030": ("天空为什么是蓝色的？,因为空气散射蓝光。", "二加三等于多少？,等于五。"),
    "big5": ("天空為什麼是藍色的？,因為空氣散射藍光。", "臺灣最高的山是哪一座？,玉山。"),
    "shift_jis": ("空はなぜ青いのですか？,空気が青い光を散乱するからです。", "「吾輩は猫である」の作者は誰ですか？,夏目漱石です。"),
    "euc_kr": ("하늘은 왜 파란색인가요?,공기가 푸른 빛을 산란시키기 때문입니다.", "이 더하기 삼은 얼마입니까?,오입니다."),
    "cp1251": ("Почему небо голубое?,Воздух рассеивает синий свет.", "Сколько будет два плюс три?,Пять."),
    "koi8-r": ("Почему небо голубое?,Воздух рассеивает синий свет.", "Сколько будет два плюс три?,Пять."),
}


def error_of(path: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        [row.text("question", "data.prompt_key") for row in read_rows(str(path))]
    return caught.value


@pytest.mark.parametrize("name", ["utf-16", "utf-32", "utf-8-sig", "utf-16-be", "utf-32-be"])
def test_a_byte_order_mark_makes_the_encoding_certain(tmp_path: Path, name: str) -> None:
    mark = "\ufeff" if name.endswith("be") else ""
    content = f"{mark}{json.dumps(ROW, ensure_ascii=False)}\n".encode(name)
    for path, data in ((tmp_path / "a.jsonl", content), (tmp_path / "a.jsonl.gz", gzip.compress(content))):
        path.write_bytes(data)
        assert [row.values for row in read_rows(str(path))] == [ROW]
    (tmp_path / "a.csv").write_bytes(f"{mark}question\tanswer\r\n1 + 1?\t你好\r\n".encode(name))
    assert [row.values for row in read_rows(str(tmp_path / "a.csv"))] == [{"question": "1 + 1?", "answer": "你好"}]


@pytest.mark.parametrize("name", ["UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"])
@pytest.mark.parametrize("question", ["What is 1 + 1?", "天空为什么是蓝色的？" * 8])
def test_without_a_mark_it_is_named(tmp_path: Path, name: str, question: str) -> None:
    for file, content in (("a.jsonl", json.dumps({"question": question}, ensure_ascii=False)), ("a.csv", f"question\n{question}\n")):
        (tmp_path / file).write_bytes(content.encode(name))
        error = error_of(tmp_path / file)
        assert f"the file is {name[:6]}" in error.what and f"iconv -f {name} -t UTF-8" in error.fix


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_the_right_text_comes_first(tmp_path: Path, name: str, suffix: str) -> None:
    for number, lines in enumerate(([TEXTS[name]], [*MORE[name]], [TEXTS[name], *MORE[name]])):
        pairs = [line.split(",") for line in lines]
        path = tmp_path / f"{number}{suffix}"
        text = "question,answer\n" + "\n".join(lines)
        if suffix == ".jsonl":
            text = "\n".join(json.dumps({"question": question, "answer": answer}, ensure_ascii=False) for question, answer in pairs)
        path.write_bytes(text.encode(name))
        encoding, shown = re.findall(r"([A-Z0-9-]+) reads '([^']*)'", error_of(path).fix)[0]
        assert shown in text.replace("\n", " ") and path.read_bytes().decode(encoding) == text, f"{number}: {encoding} {shown}"


@pytest.mark.parametrize(
    ("name", "text"), [("big5", "問題,答案"), ("euc_kr", "질문,답변"), ("koi8-r", "вопрос,ответ"), ("gb18030", "问题,答案")]
)
def test_of_a_few_characters_half_width_kana_are_not_the_first_reading(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "a.csv").write_bytes(f"question,answer\n{text}\n".encode(name))
    readings = re.findall(r"([A-Z0-9-]+) reads '([^']*)'", error_of(tmp_path / "a.csv").fix)
    assert readings[0][0] != "CP932" and text in [shown for _, shown in readings]
    assert name == "koi8-r" or readings[0][0] not in ("CP1251", "CP874"), "of two readings, the one of several bytes a character"


@pytest.mark.parametrize("name", TEXTS)
def test_the_right_text_is_among_those_that_the_likely_encodings_give(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(f"question,answer\n{TEXTS[name]}\n".encode(name))
    advice = error_of(path).fix
    listed = re.findall(r"([A-Z0-9-]+) reads '([^']*)'", advice)
    right = [encoding for encoding, text in listed if text and text in TEXTS[name]]
    assert right and path.read_bytes().decode(right[0]).splitlines()[1] == TEXTS[name]
    assert not re.search(r"iconv -f", advice)  # a command that names one of them could be wrong


def test_bytes_that_are_text_in_no_encoding_are_given_no_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"question": "' + bytes(range(128, 256)) * 3 + b'"}\n')
    assert "not UTF-8: byte 0x80" in error_of(tmp_path / "a.jsonl").what


@pytest.mark.parametrize("text", ["What is 1 + 1?", "天空为什么是蓝色的？", "Où est-il ?"])
def test_utf8_with_nul_bytes_is_not_taken_for_utf16(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.csv").write_text(f"question,answer\n{text},\0\0\n")
    (row,) = read_rows(str(tmp_path / "a.csv"))
    assert row.text("question", "prompt_key") == text
    with pytest.raises(UserError, match="a NUL character"):
        row.text("answer", "response_key")
    (tmp_path / "b.csv").write_bytes(b"\0" * 100)
    assert "NUL bytes" in error_of(tmp_path / "b.csv").what


def test_nul_bytes_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json.dumps({"question": "a" * 100}).encode() + b"\n" + b"\0" * 50)
    error = error_of(tmp_path / "a.jsonl")
    assert error.where == f"{tmp_path}/a.jsonl:2" and "NUL byte" in error.what


def test_a_mark_at_the_start_of_a_line_is_not_part_of_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\ufeff{"a": 1}\n\ufeff{"a": 2}\n')
    assert [row.values for row in read_rows(str(tmp_path / "a.jsonl"))] == [{"a": 1}, {"a": 2}]
    (tmp_path / "a.txt").write_text("one\n\n\ufefftwo\n")
    with pytest.raises(UserError, match="a byte order mark") as caught:
        list(read_rows(str(tmp_path / "a.txt")))
    assert caught.value.where == f"{tmp_path}/a.txt:3"
    (tmp_path / "b.txt").write_text("one \ufeff two\n")
    assert [row.values for row in read_rows(str(tmp_path / "b.txt"))] == [{"text": "one \ufeff two"}]


def test_a_file_of_utf8_with_a_damaged_line_is_not_given_another_encoding(tmp_path: Path) -> None:
    lines = [json.dumps({"question": text}, ensure_ascii=False).encode() for text in TEXTS.values()]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines, b'{"question": "caf\xe9"}']))
    error = error_of(tmp_path / "a.jsonl")
    assert error.where == f"{tmp_path}/a.jsonl:{len(lines) + 1}"
    assert error.fix == "the other lines of the file are UTF-8: write this one again, or remove it"


def test_a_long_line_is_judged_by_its_beginning(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(("[" + ",".join(['{"question": "' + TEXTS["gbk"] + '"}'] * 3000) + "]").encode("gbk"))
    assert "GB18030 reads" in error_of(tmp_path / "a.json").fix
