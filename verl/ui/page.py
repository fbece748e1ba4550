"""The page: what is on it, and what its buttons do. Each does one call of the Python API in a process of its own (`verl.ui.jobs`)."""

import html
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from verl.errors import UserError
from verl.pace import clock
from verl.ui.curve import picture
from verl.ui.jobs import Answer, Job, Jobs
from verl.ui.texts import LANGUAGES, translate
from verl.ui.watch import look

CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
SECONDS = 1.5  # between two looks at what runs
SHOWN_ROWS = 5  # drawn at random, beside the longest
HIDDEN: Any = "hidden"
Values = dict[Any, Any]


def theme() -> Any:
    """Return the look of the page: quiet colours, and fonts that the machine has."""
    return gr.themes.Base(
        primary_hue="blue",
        neutral_hue="gray",
        radius_size="sm",
        font=["system-ui", "-apple-system", "Segoe UI", "Noto Sans SC", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    )


class Page:
    """The page in one language.

    Args:
        language: one of LANGUAGES.
        jobs: what was started; the pages in all languages share it.
        directory: folder of runs and uploaded files.
    """

    def __init__(self, language: str, jobs: Jobs, directory: Path):
        self._language, self._jobs, self._directory = language, jobs, directory

    def build(self) -> gr.Blocks:
        """Return the page."""
        with gr.Blocks(title=f"verl · {self._text('title')}", analytics_enabled=False) as blocks:
            gr.HTML(self._head())
            with gr.Tab(self._text("step1")):
                self._choose()
            with gr.Tab(self._text("step2")):
                self._train()
            with gr.Tab(self._text("step3")):
                self._try()
            timer = gr.Timer(SECONDS)
            seen = gr.State(None)
            outputs = [seen, self._found, self._status, self._curve, self._log, self._scores, self._report]
            timer.tick(self._look, [seen, self._output], outputs, show_progress=HIDDEN, queue=False)
        return blocks

    def _text(self, key: str, **values: object) -> str:
        return translate(key, self._language, **values)

    def _head(self) -> str:
        other = next(one for one in LANGUAGES if one != self._language)
        link = f'<a href="/{other}/" lang="{other}">{self._text("other")}</a>'
        return f'<div class="head"><h1>{self._text("title")}</h1>{link}</div><p class="lead">{self._text("lead")}</p>'

    def _box(self, name: str, value: str = "", **options: Any) -> gr.Textbox:
        return gr.Textbox(value, label=self._text(name), info=self._text(f"{name}_info"), elem_id=name, **options)

    # What is on it

    def _choose(self) -> None:
        self._model = self._box("model", placeholder="Qwen/Qwen2.5-0.5B-Instruct")
        self._data = self._file_box("data")
        self._validation = self._file_box("validation")
        button = gr.Button(self._text("inspect"), variant="secondary", elem_id="inspect")
        self._found = gr.HTML(elem_id="found")
        with gr.Accordion(self._text("more"), open=False):
            self._more = self._box("more", lines=4, placeholder="data.train_batch_size=32\ndata.max_length=1024")
        button.click(self._on_inspect, {self._model, self._data, self._validation, self._more}, self._found, show_progress=HIDDEN)

    def _file_box(self, name: str) -> gr.Textbox:
        """A box for a path, with a button that uploads a file and fills in its path."""
        with gr.Row(equal_height=False):
            box = self._box(name, scale=4)
            button = gr.UploadButton(self._text("upload"), size="sm", scale=1, min_width=120, elem_id=f"{name}-upload")
        button.upload(self._on_upload, button, box)
        return box

    def _train(self) -> None:
        with gr.Row():
            self._epochs = gr.Number(
                1, label=self._text("epochs"), info=self._text("epochs_info"), precision=0, minimum=1, min_width=160, elem_id="epochs"
            )
            self._lr = self._box("lr", "1e-5", min_width=160)
            self._rank = gr.Number(
                0, label=self._text("rank"), info=self._text("rank_info"), precision=0, minimum=0, min_width=160, elem_id="rank"
            )
        self._output = self._box("output", str(self._directory / "run"))
        with gr.Row():
            start = gr.Button(self._text("start"), variant="primary", elem_id="start")
            stop = gr.Button(self._text("stop"), elem_id="stop")
        self._status = gr.HTML(self._said("idle"), elem_id="status")
        self._curve = gr.HTML(elem_id="curve")
        self._log = gr.HTML(elem_id="log")
        settings = {self._model, self._data, self._validation, self._more, self._epochs, self._lr, self._rank, self._output}
        start.click(self._on_start, settings, self._status, show_progress=HIDDEN)
        stop.click(self._on_stop, None, self._status, show_progress=HIDDEN)

    def _try(self) -> None:
        self._compare = gr.Checkbox(True, label=self._text("compare"), elem_id="compare")
        with gr.Row():
            mine = gr.Chatbot(label=self._text("result"), height=300, render_markdown=False, buttons=[], min_width=280, elem_id="mine")
            base = gr.Chatbot(label=self._text("base"), height=300, render_markdown=False, buttons=[], min_width=280, elem_id="base")
        self._said_so_far = gr.State(([], []))
        self._compare.change(lambda shown: gr.update(visible=shown), self._compare, base)
        self._question = gr.Textbox(label=self._text("question"), placeholder=self._text("question_hint"), elem_id="question")
        with gr.Row():
            ask = gr.Button(self._text("ask"), variant="primary", elem_id="ask")
            clear = gr.Button(self._text("clear"), elem_id="clear")
        self._chat_error = gr.HTML(elem_id="chat-error")
        with gr.Row():
            self._tokens = gr.Number(256, label=self._text("tokens"), precision=0, minimum=1, min_width=160, elem_id="tokens")
            self._temperature = gr.Number(
                0, label=self._text("temperature"), info=self._text("temperature_info"), minimum=0, min_width=160, elem_id="temperature"
            )
        inputs = {self._question, self._said_so_far, self._compare, self._output, self._model, self._tokens, self._temperature}
        for ready in (ask.click, self._question.submit):
            ready(self._on_ask, inputs, [self._question, self._said_so_far, mine, base, self._chat_error])
        clear.click(lambda: (([], []), [], [], ""), None, [self._said_so_far, mine, base, self._chat_error])
        self._measure()

    def _measure(self) -> None:
        """Evaluation and report, below the chat."""
        test = self._file_box("test")
        with gr.Row():
            after = gr.Button(self._text("evaluate"), elem_id="evaluate")
            before = gr.Button(self._text("evaluate_base"), elem_id="evaluate-base")
        self._scores = gr.HTML(elem_id="scores")
        report = gr.Button(self._text("report"), elem_id="write-report")
        self._report = gr.HTML(elem_id="report")
        inputs = [test, self._output, self._model, self._tokens]
        after.click(lambda *values: self._on_evaluate(*values, is_base=False), inputs, self._scores, show_progress=HIDDEN)
        before.click(lambda *values: self._on_evaluate(*values, is_base=True), inputs, self._scores, show_progress=HIDDEN)
        report.click(self._on_report, self._output, self._report, show_progress=HIDDEN)

    # What its buttons do

    def _on_upload(self, path: str) -> str:
        """Keep an uploaded file beside the runs, which name it in their settings. A file of the same name and other contents stays."""
        source, folder = Path(path), self._directory / "uploads"
        folder.mkdir(parents=True, exist_ok=True)
        names = (source.name, *(f"{source.stem}-{number}{source.suffix}" for number in range(2, 1000)))
        target = next(folder / name for name in names if not (folder / name).exists() or _is_same(source, folder / name))
        shutil.copyfile(source, target)
        return str(target)

    def _on_inspect(self, values: Values) -> str:
        page = str(self._jobs.folder / f"data-{len(self._jobs.pages) + 1}.html")
        return self._begin("inspect", lambda: {"given": self._given(values), "page": page, "rows": SHOWN_ROWS}) or self._said(
            "inspect_wait"
        )

    def _on_start(self, values: Values) -> str:
        def arguments() -> dict[str, Any]:
            chosen = {
                "trainer.total_epochs": values[self._epochs] or 1,
                "optim.lr": values[self._lr].strip(),
                "model.lora_rank": values[self._rank] or 0,
                "trainer.default_local_dir": self._needed("output", values[self._output]),
            }
            return {"given": [chosen, *self._given(values)]}

        return self._begin("train", arguments, values[self._output]) or self._said("loading")

    def _on_stop(self) -> str:
        return self._said("stopping" if self._jobs.stop() else "idle")

    def _on_evaluate(self, test: str, output: str, model: str, tokens: int | None, *, is_base: bool) -> str:
        def arguments() -> dict[str, Any]:
            run = self._needed("output", output)
            evaluated = self._needed("model", model) if is_base else run
            what = "base" if is_base else _newest(run)
            directory = Path(run).expanduser() / f"eval-{what}-{Path(self._needed('test', test)).stem}"
            given = {
                "model_path": evaluated,
                "test_file": test.strip(),
                "output_dir": str(directory),
                "max_new_tokens": tokens or 256,
                "overwrite": True,  # of this step, on these rows
            }
            return {"given": [given]}

        return self._begin("evaluate", arguments) or self._said("evaluating", time=clock(0))

    def _on_report(self, output: str) -> str:
        return self._begin("report", lambda: {"run": self._needed("output", output)}) or self._said("reporting")

    def _on_ask(self, values: Values) -> list[Any]:
        """Return what is left in the box of the question, the chats, what is shown of each, and the error."""
        question, nothing = values[self._question].strip(), [gr.skip()] * 3
        if not question:
            return ["", *nothing, ""]
        number = 2 if values[self._compare] else 1
        chats = [[*chat, {"role": "user", "content": question}] for chat in values[self._said_so_far][:number]]
        try:
            models = [self._needed("output", values[self._output]), *([self._needed("model", values[self._model])] if number > 1 else [])]
            sampling = {"max_new_tokens": values[self._tokens] or 256, "temperature": values[self._temperature] or 0}
            answer = self._jobs.chat({"models": models, "chats": chats, "sampling": sampling})
        except UserError as error:
            return [question, *nothing, self._error(error)]
        if "result" not in answer:
            return [question, *nothing, self._failed(answer)]
        told = [[*chat, {"role": "assistant", "content": text}] for chat, text in zip(chats, answer["result"], strict=True)]
        told += values[self._said_so_far][number:]
        return ["", tuple(told), *map(_shown, told), ""]

    def _begin(self, kind: str, arguments: Any, directory: str = "") -> str:
        """Start a call. Returns the error if it cannot be started, or an empty text."""
        try:
            self._jobs.start(kind, arguments(), directory)
        except UserError as error:
            return self._error(error)
        return ""

    def _given(self, values: Values) -> list[Any]:
        """Return what is chosen as arguments of `verl.sft`. Raises UserError: a box is empty."""
        chosen = {
            "model.partial_pretrain": self._needed("model", values[self._model]),
            "data.train_files": self._needed("data", values[self._data]),
        }
        if values[self._validation].strip():
            chosen["data.val_files"] = values[self._validation].strip()
        return [chosen, *filter(None, (line.strip() for line in values[self._more].splitlines()))]

    def _needed(self, name: str, value: str) -> str:
        if not value.strip():
            raise UserError(self._text("need"), where=self._text(name), fix=self._text("need_fix"))
        return value.strip()

    # What it shows of what runs

    def _look(self, seen: Any, output: str) -> list[Any]:
        """Return what has changed since the last look, for all that shows something of a call."""
        jobs = self._jobs
        train = jobs.last.get("train")
        run = look(Path(train.directory).expanduser(), train.log_start) if train is not None else None
        now = {
            "found": self._of("inspect", self._inspection, "inspect_wait"),
            "status": self._training(train, run),
            "curve": "" if run is None else picture(run.points, run.total, self._text("step")),
            "log": "" if run is None else f'<pre class="log" aria-label="{self._text("log")}">{html.escape(run.log)}</pre>',
            "scores": self._evaluations(),
            "report": self._of("report", self._written, "reporting"),
        }
        before = seen or {}
        changed = {name: value if before.get(name) != value and value is not None else gr.skip() for name, value in now.items()}
        return [now, *changed.values()]

    def _of(self, kind: str, show: Any, wait: str) -> str | None:
        """Return what to show of the last call of a kind; None if there was none."""
        job = self._jobs.last.get(kind)
        if job is None:
            return None
        if job.answer is None:
            return self._said("stopping" if job.is_stopping else wait, time=clock(job.seconds))
        return str(show(job)) if "result" in job.answer else self._failed(job.answer)

    def _inspection(self, job: Job) -> str:
        found = job.answer["result"] if job.answer else {}
        text = self._said("inspected", used=f"{found['used']:,}", steps=f"{found['steps'] or 0:,}")
        wrong = self._said("invalid", what=", ".join(found["invalid"])) if found["invalid"] else ""
        return text + wrong + self._framed(found["page"])

    def _evaluations(self) -> str | None:
        """Return the newest result of each model, and what is to be said of the last evaluation."""
        last = self._jobs.last.get("evaluate")
        results = [job for job in self._jobs.ended if job.kind == "evaluate" and job is not last and "result" in (job.answer or {})]
        newest = {job.arguments["given"][0]["model_path"]: job for job in results}
        if last is not None and "result" in (last.answer or {}):
            newest.pop(last.arguments["given"][0]["model_path"], None)
        said = self._of("evaluate", self._evaluation, "evaluating")
        return None if said is None else "".join(map(self._evaluation, newest.values())) + said

    def _evaluation(self, job: Job) -> str:
        scores: dict[str, Any] = job.answer["result"]["scores"] if job.answer else {}
        interval = scores.get("confidence_interval_95")
        name = next((name for name, value in scores.items() if isinstance(value, float) and 0 <= value <= 1), "exact_match")
        text = self._text("score", model=job.arguments["given"][0]["model_path"], name=name, value=f"{scores.get(name, 0):.1%}")
        if isinstance(interval, Sequence) and len(interval) == 2:
            text += self._text("interval", low=f"{interval[0]:.1%}", high=f"{interval[1]:.1%}")
        return f'<div class="said">{html.escape(text)}</div>'

    def _written(self, job: Job) -> str:
        return self._framed(job.answer["result"]["page"]) if job.answer else ""

    def _framed(self, page: str) -> str:
        """A page that a call wrote, in a frame of its own, with a link."""
        address = f"/pages/{self._jobs.show(page)}"
        link = f'<p><a href="{address}" target="_blank" rel="noopener">{self._text("open")}</a></p>'
        return f'<div class="shown">{link}<iframe src="{address}" title="{html.escape(page)}"></iframe></div>'

    def _training(self, job: Job | None, run: Any) -> str:
        """Return the state of the run in words."""
        running = self._jobs.running
        if job is None:
            return self._said("idle") if running is None else self._busy(running)
        if job.answer is None:
            if job.is_stopping:
                return self._said("stopping")
            if not run.total:
                return self._said("loading")
            left = self._text("left", left=run.left) if run.left else ""
            bar = f'<progress max="{run.total}" value="{run.step}"></progress>'
            text = self._text("running", step=f"{run.step:,}", total=f"{run.total:,}") + left
            return f'<div class="said" role="status">{text}{bar}</div>'
        if "error" in job.answer:
            return self._failed(job.answer)
        checkpoint = job.answer["result"]["checkpoint"] if "result" in job.answer else job.answer["stopped"]
        name = ("done" if "result" in job.answer else "stopped") + ("" if checkpoint else "_nothing")
        return self._said(name, checkpoint=checkpoint, time=clock(job.seconds))

    def _busy(self, job: Job) -> str:
        return self._said("busy", kind=self._text(f"kind_{job.kind}"), time=clock(job.seconds))

    def _said(self, key: str, **values: object) -> str:
        return f'<div class="said" role="status">{html.escape(self._text(key, **values))}</div>'

    def _failed(self, answer: Answer) -> str:
        if "error" not in answer:
            return self._said("stopped_nothing")
        return self._error(UserError(answer["error"]["what"], where=answer["error"]["where"], fix=answer["error"]["fix"]))

    def _error(self, error: UserError) -> str:
        """An error as the command line has it: where, what, and what to do."""
        where = f'<span class="where">{html.escape(error.where)}</span>: ' if error.where else ""
        fix = f"<pre>{self._text('fix')}: {html.escape(error.fix)}</pre>" if error.fix else ""
        return f'<div class="wrong" role="alert">{where}{html.escape(error.what)}{fix}</div>'


def _is_same(one: Path, other: Path) -> bool:
    return one.stat().st_size == other.stat().st_size and one.read_bytes() == other.read_bytes()


def _newest(run: str) -> str:
    """Return the number of a run's newest step, for the name of its evaluation."""
    path = Path(run).expanduser() / "latest_checkpointed_iteration.txt"
    return path.read_text(encoding="utf-8").strip() if path.is_file() else "model"


def _shown(chat: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return a chat as text: gradio would take what looks like a tag for one, and load an image from wherever it is."""
    return [{**message, "content": html.escape(message["content"]).replace("\n", "<br>")} for message in chat]
