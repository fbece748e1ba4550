"""GGUF files, for llama.cpp, Ollama and LM Studio, made by llama.cpp's own converter."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from verl.errors import UserError

VARIABLE = "LLAMA_CPP"
NAMES = ("convert_hf_to_gguf.py", "convert-hf-to-gguf", "convert_hf_to_gguf")
MAGIC = b"GGUF"
GET = (
    "git clone --depth 1 https://github.com/ggml-org/llama.cpp and pip install ./llama.cpp/gguf-py sentencepiece, "
    f"then {VARIABLE}=path/to/llama.cpp; or brew install llama.cpp"
)


def find_converter() -> list[str]:
    """Return the words that start llama.cpp's converter.

    It is looked for in the checkout of llama.cpp that the variable LLAMA_CPP names, which may be the file itself, and then in PATH.

    Raises:
        UserError: there is none.
    """
    if named := os.environ.get(VARIABLE):
        place = Path(named).expanduser()
        file = place / NAMES[0] if place.is_dir() else place
        if not file.is_file():
            raise UserError(f"there is no {NAMES[0]}", where=f"{VARIABLE}={named}", fix=f"name a checkout of llama.cpp: {GET}")
        return [sys.executable, str(file.resolve())]
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        raise UserError(f"llama.cpp's converter, {NAMES[0]}, is not installed", where="gguf", fix=GET)
    return [found]


def check_file(name: str) -> Path:
    """Return the path of a GGUF file that is to be written. Raises UserError: it exists, or its folder does not."""
    file = Path(name).expanduser().absolute()
    if file.exists() or file.is_symlink():
        raise UserError("exists", where=f"gguf={name}", fix="choose a new name, or remove it")
    if not file.parent.is_dir():
        raise UserError(f"there is no folder {file.parent}", where=f"gguf={name}", fix="make it, or choose another one")
    if file.suffix != ".gguf":
        raise UserError("does not end in .gguf", where=f"gguf={name}", fix=f"{file.stem}.gguf: programs know the format by it")
    return file


def convert(folder: Path, file: Path, converter: list[str], kind: str) -> None:
    """Convert a model directory. A conversion that fails leaves no file behind.

    Args:
        kind: type of the weights: auto, f32, f16, bf16 or q8_0.
    Raises:
        UserError: the converter fails, with the last line that it says.
    """
    unfinished = file.with_name(f".{file.name}")
    command = [*converter, str(folder), "--outfile", str(unfinished), "--outtype", kind]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603, the user's own program
        if done.returncode == 0 and unfinished.is_file() and _begins_right(unfinished):
            os.replace(unfinished, file)
            return
    finally:
        unfinished.unlink(missing_ok=True)
    lines = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
    said = lines[-1].strip() if lines else f"exit code {done.returncode}"
    missing = "ModuleNotFoundError" in said
    fix = f"install it for {converter[0]}: {GET}" if missing else f"see what it says: {' '.join(command)}"
    raise UserError(f"llama.cpp's converter failed: {said}", where=f"gguf={file}", fix=fix)


def _begins_right(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(MAGIC)) == MAGIC
