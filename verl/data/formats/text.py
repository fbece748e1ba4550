"""Plain text: a paragraph is a row."""

from pathlib import Path

from verl.data.formats.stream import MARK, MARK_INSIDE, MAX_ROW_BYTES, REMOVE_MARKS, File, Line, finder, lines
from verl.data.row import Row, Rows, checked_row
from verl.errors import UserError


def text_rows(file: File) -> Rows:
    """Yield one row per paragraph, that is, the lines up to a blank one. Its location is its first line."""
    paragraph: list[Line] = []
    size = 0
    for line in lines(file):
        if line.text.strip():
            paragraph.append(line)
            size = size + len(line.text) if len(paragraph) > 1 else len(line.text)
            if size > MAX_ROW_BYTES:
                found = f"the paragraph is longer than {MAX_ROW_BYTES // 2**20} million characters"
                raise UserError(found, where=f"{file.path}:{paragraph[0].number}", fix="separate paragraphs by blank lines")
        elif paragraph:
            yield _row(file.path, paragraph)
            paragraph = []
    if paragraph:
        yield _row(file.path, paragraph)


def _row(path: Path, paragraph: list[Line]) -> Row | UserError:
    bad = next((line.bad for line in paragraph if line.bad), None)
    where, text = f"{path}:{paragraph[0].number}", "\n".join(line.text for line in paragraph)
    if text.startswith(MARK):
        return UserError(MARK_INSIDE, where=where, fix=REMOVE_MARKS)
    return checked_row(where, {"text": text}, finder(path, bad), is_text=True)
