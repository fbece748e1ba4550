"""`make families` and `make prove`: prove every family of tests/prove/configs.py, and write the table of docs/models.md.

    python tests/prove/run_families.py [--ci] [--folder FOLDER] [--table] [NAME …]

Two families at a time, each in a process of its own with a time limit. What is found is kept in the folder, a file for each family, so that
the next call goes on; remove the folder to begin again.
"""

import argparse
import json
import multiprocessing
import os
import re
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a test that imports this keeps its GPU
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prove.configs import IN_CI, families

from verl.prove import command

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- families -->", "<!-- end of families -->"
SECONDS, CPU_SECONDS = 900, 150  # for each family
CHECK = "the check before training"
FINE_TUNING = (CHECK, "packed = alone", "micro-batches", "verl sft = a plain loop", "one rank = two", "reload", "auxiliary loss")
ADAPTER = ("adapter = peft = merged", "export", "going on", "router untouched")
GOOD = ("holds", "slower", "none")


def prove_family(name: str, folder: Path) -> None:
    """Prove a family, and write what is found into its file."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    config = folder / "configs" / file_name(name)
    families()[name]().save_pretrained(config)
    log = os.open(folder / f"{file_name(name)}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    partial = folder / f"{file_name(name)}.partial"
    command.prove(str(config / "config.json"), json_file=partial)
    used = os.times()
    cpu_seconds = used.user + used.system + used.children_user + used.children_system
    found = json.loads(partial.read_text()) | {"family": name, "cpu_seconds": round(cpu_seconds, 1)}
    partial.write_text(json.dumps(found, indent=1))
    partial.rename(folder / f"{file_name(name)}.json")


def file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9_.-]+", "-", name.lower())


def run(names: Sequence[str], folder: Path, processes: int) -> None:
    """Prove the families that the folder has nothing of, the given number at a time."""
    context = multiprocessing.get_context("fork")
    waiting = [name for name in names if not (folder / f"{file_name(name)}.json").is_file()]
    running: dict[str, tuple[Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < processes:
            name = waiting.pop(0)
            running[name] = context.Process(target=prove_family, args=(name, folder)), time.monotonic()
            running[name][0].start()
        time.sleep(0.1)
        for name, (process, since) in list(running.items()):
            if process.is_alive() and time.monotonic() - since < SECONDS:
                continue
            is_late = process.is_alive()
            process.kill()
            process.join()
            del running[name]
            print(line_of(name, folder, "took too long" if is_late else "refused"), flush=True)


def line_of(name: str, folder: Path, otherwise: str) -> str:
    """What the folder has of a family, as a line."""
    path = folder / f"{file_name(name)}.json"
    if not path.is_file():
        log = (folder / f"{file_name(name)}.log").read_text(errors="replace").strip().splitlines()
        outcome = {
            "group": "model",
            "name": "twin",
            "state": "wrong",
            "found": f"{otherwise}: {log[-1] if log else ''}",
            "difference": None,
        }
        path.write_text(json.dumps({"family": name, "seconds": 0, "described": "", "outcomes": [outcome]}))
    found = json.loads(path.read_text())
    text = ""
    for state in ("wrong", "refused"):
        named: dict[str, list[str]] = {}
        for outcome in found["outcomes"]:
            if outcome["state"] == state:
                named.setdefault(outcome["found"][:200], []).append(outcome["name"])
        text += "".join(f"\n    {state} {', '.join(names)}: {why}" for why, names in named.items())
    return f"{name:<28} {found.get('cpu_seconds', 0):>5.0f} s{text or '  holds'}"


# The table


def column(found: dict[str, Any], names: Sequence[str]) -> str:
    """The state of some lines together: the worst, or none."""
    states = [o["state"] for o in found["outcomes"] if o["name"] in names]
    return next((state for state in ("wrong", "refused", "slower", "holds") if state in states), "none")


def generation(found: dict[str, Any]) -> str:
    """The state of generation: native, or hf where native refuses; wrong if either is."""
    native, hf = column(found, ("native = plain",)), column(found, ("hf = plain",))
    if "wrong" in (native, hf):
        return "wrong"
    return native if native != "refused" else "slower" if hf in GOOD else "refused"


def cells(found: dict[str, Any]) -> list[str]:
    return [column(found, FINE_TUNING), generation(found), column(found, ADAPTER), column(found, ("rollout = trainer",))]


def table(folder: Path) -> str:
    """The table of docs/models.md of everything in the folder."""
    everything = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    everything = [found for found in everything if "family" in found]
    rows = [(found, cells(found)) for found in everything]
    shown = {"holds": "exact", "slower": "exact, slower", "refused": "refused", "wrong": "**wrong**", "none": "–"}
    lines = ["| family | fine-tuning | generation | adapter → export | GRPO | path |", "|---|---|---|---|---|---|"]
    lines += [f"| {found['family']} | {' | '.join(shown[cell] for cell in states)} | {path_of(found)} |" for found, states in rows]
    counts = [sum(states[i] in ("holds", "slower") for _, states in rows) for i in range(4)]
    wrong = [o for found, _ in rows for o in found["outcomes"] if o["state"] == "wrong"]
    broken = [o for o in wrong if o["found"].startswith("traceback")]
    totals = [
        f"| of {len(rows)} families | |",
        "|---|---|",
        *(
            f"| {name} | {count} |"
            for name, count in zip(("fine-tuning exact", "generation equal", "adapter → export exact", "GRPO"), counts, strict=True)
        ),
        f"| wrong somewhere; lines that end in a traceback | {sum('wrong' in states for _, states in rows)}; {len(broken)} |",
    ]
    return "\n".join([*totals, "", *lines])


def path_of(found: dict[str, Any]) -> str:
    """The path that the family takes in training and in generation, or why it takes none, in a few words."""
    outcomes = {o["name"]: o for o in found["outcomes"]}
    packed = outcomes.get("packed = alone") or outcomes.get("twin") or {"state": "none", "found": ""}
    why = packed["found"].rpartition("; ")[2].replace("|", "/")[:160]
    training = {"holds": "packed", "slower": f"one document at a time: {why}"}.get(packed["state"], why)
    engines = [name.partition(" ")[0] for name in ("native = plain", "hf = plain") if outcomes.get(name, {}).get("state") in GOOD]
    return "; ".join(filter(None, (training, *engines[:1])))


def write_table(folder: Path) -> None:
    """Write the table between the marks of docs/models.md."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(folder)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--ci", action="store_true", help="the families of CI; exit code 1 if anything is wrong")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "families")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="write the table of docs/models.md")
    options = parser.parse_args()
    names = options.names or (IN_CI if options.ci else list(families()))
    if unknown := [name for name in names if name not in families()]:
        parser.error(f"no family named {', '.join(unknown)}; there are: {', '.join(families())}")
    (options.folder / "configs").mkdir(parents=True, exist_ok=True)
    run(names, options.folder, options.processes)
    if options.table:
        write_table(options.folder)
    files = [options.folder / f"{file_name(name)}.json" for name in names]
    wrong = [o for path in files for o in json.loads(path.read_text())["outcomes"] if o["state"] == "wrong"]
    print(f"{len(names)} families, {len(wrong)} lines wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
