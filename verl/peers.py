"""Watches the other ranks: which of them have died, hang or have failed, and which only work for long.

A thread of each rank writes a heartbeat to the store of the run: what the rank does, and how often it has got on. Rank 0 reads all
heartbeats, the others read that of rank 0. The first rank that finds another one dead or hung writes a verdict, which ends all.

A rank is dead if its heartbeat stops. It hangs if it does not get on in a phase that is no work of one rank alone, such as a training step,
while no rank works alone. If several do not get on, that one hangs which has begun the fewest collectives. So work of one rank alone, such
as tokenizing, has no time limit.
"""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint.api import CheckpointException

from verl import signals
from verl.errors import RANK_EXIT_CODE, SAVED_EXIT_CODE, RankError, Stopped, UserError
from verl.rendezvous import Place

BEAT_SECONDS = 1.0  # between heartbeats, with up to RANKS_PER_SECOND ranks; with more, the store would be busy with them
RANKS_PER_SECOND = 256
LOST_SECONDS = 4.0  # without a heartbeat, for a rank whose connection has broken
STORE_SECONDS = 5.0  # without an answer of the store
GRACE_SECONDS = 8.0  # after a verdict, for the main thread to end by itself
LEAVE_SECONDS = 5.0  # for rank 0, which has the store, to wait for the others at the end
WAITING = ("torch/distributed/", "verl/exchange.py", "verl/peers.py")  # innermost files of a main thread that waits for other ranks
_BROKEN = re.compile(r"(?i)gloo|nccl|connection|broken pipe|socket|recvvalue|timed out|timeout|store")  # errors of collectives
COMPILING = ("torch/_dynamo/", "torch/_inductor/")


@dataclass
class Seen:
    """What this rank knows of another one.

    Attributes:
        beat: its newest heartbeat.
        since: when it came, by this rank's clock.
    """

    beat: dict[str, Any] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)

    def update(self, beat: dict[str, Any], now: float) -> None:
        if beat.get("count") != self.beat.get("count"):
            self.beat, self.since = beat, now


@dataclass(frozen=True)
class Verdict:
    """Why all ranks end.

    Attributes:
        text: names the rank, its host, phase and step.
        rank: the rank.
        code: exit code of the others.
        teller: the rank that prints the text; -1: it has been printed.
    """

    text: str
    rank: int
    code: int
    teller: int

    def error(self, rank: int) -> BaseException:
        """Return what the main thread of a rank raises."""
        if self.code == SAVED_EXIT_CODE or self.code > 128:
            return Stopped(signal.Signals(self.code - 128) if self.code > 128 else signal.SIGTERM, None, phase=signals.where())
        error = RankError(self.text)
        error.exit_code, error.tells = self.code, rank == self.teller
        return error


class Peers:
    """The other ranks of a run, from this rank's view. Its thread runs until `leave`.

    Args:
        store: the store of the run.
        number: distinguishes the groups that this process has joined, one after another.
        timeout_seconds: see `verl.config.shared.DistConfig`.
    Raises:
        UserError: another process has this rank too, or a rank does not come.
    """

    def __init__(self, store: dist.Store, number: int, place: Place, timeout_seconds: float):
        self._store = dist.PrefixStore(f"peers {number}", store.clone())  # type: ignore[attr-defined]  # its own connection: another thread may wait in the other one
        self._rank, self._ranks, self._timeout, self._has_server = place.rank, place.ranks, timeout_seconds, place.has_server
        self._verdict: Verdict | None = None
        self._count, self._moves, self._moved_at = 0, -1, time.monotonic()
        self._seen = {rank: Seen() for rank in range(place.ranks)}
        self._main, self._ended, self._lock = threading.main_thread().ident, threading.Event(), threading.Lock()
        self._has_passed_on, self._lost_at = False, time.monotonic()
        self._register()
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)
        self._thread.start()
        signals.listeners.append(self._beat_now)
        try:
            self._wait_for_all()
        except BaseException as error:
            self.leave(error)  # the store ends with rank 0, and the others are still to read there why
            raise

    def check(self) -> None:
        """Raise a RankError, or Stopped, if there is a verdict."""
        if self._verdict is not None:
            raise self._verdict.error(self._rank)

    def explain(self, error: BaseException) -> BaseException:
        """Return the error to raise in place of that of a collective, once it is known which rank has ended."""
        deadline = time.monotonic() + LOST_SECONDS + 4 * self._seconds()
        self._lost_at = time.monotonic()
        while self._verdict is None and time.monotonic() < deadline:
            self._find_lost()
            time.sleep(0.2)
        return error if self._verdict is None else self._verdict.error(self._rank)

    def cause_of(self, error: BaseException) -> BaseException:
        """Return what explains an error: if a collective broke, as `explain`; else the error itself."""
        is_broken = isinstance(error, (RuntimeError, CheckpointException)) and _BROKEN.search(str(error)) is not None
        return self.explain(error) if is_broken else error

    def leave(self, error: BaseException | None = None) -> None:
        """Tell the others that this rank ends, and why.

        Args:
            error: what ends it; None: it is done.
        """
        code, what = _end_of(error)
        number = error.signal if isinstance(error, Stopped) and error.phase else None  # it is left at once
        if self._beat_now in signals.listeners:
            signals.listeners.remove(self._beat_now)
        with self._lock:
            self._ended.set()
            try:
                self._beat()  # the step in which it ends
                self._store.set(f"left {self._rank}", json.dumps({"code": code, "what": what, "signal": number}))
                if self._has_server:
                    self._wait_until_left()
            except RuntimeError:  # the store has ended
                pass

    def _wait_until_left(self) -> None:
        deadline = time.monotonic() + LEAVE_SECONDS
        keys = [f"left {rank}" for rank in range(self._ranks) if self._store.check([f"here {rank}"])]
        while time.monotonic() < deadline and not self._store.check(keys):
            time.sleep(0.05)

    # Coming

    def _register(self) -> None:
        host = f"{socket.gethostname()}, process {os.getpid()}"
        if self._store.add(f"here {self._rank}", 1) > 1:
            error = UserError(
                f"another process is rank {self._rank} too; this one is on {host}", where="RANK", fix="give each process a rank of its own"
            )
            error.tells = True
            self._store.compare_set("verdict", "", json.dumps([f"two processes are rank {self._rank}", self._rank, 2, -1]))
            raise error
        self._beat()

    def _wait_for_all(self) -> None:
        deadline, keys = time.monotonic() + self._timeout, [f"here {rank}" for rank in range(self._ranks)]
        while not self._store_has(keys):
            self.check()
            if time.monotonic() > deadline:
                missing = [rank for rank in range(self._ranks) if not self._store_has([f"here {rank}"])]
                error = RankError(
                    f"rank {', '.join(map(str, missing))} of {self._ranks} has not come within {self._timeout:g} s",
                    where="dist.timeout_seconds",
                    fix="start all processes, and give them the same WORLD_SIZE",
                )
                error.tells = self._rank == min(set(range(self._ranks)) - set(missing))
                raise error
            time.sleep(0.02)

    def _store_has(self, keys: list[str]) -> bool:
        with self._lock:
            return bool(self._store.check(keys))

    # The thread

    def _seconds(self) -> float:
        return BEAT_SECONDS * max(1.0, self._ranks / RANKS_PER_SECOND)

    def _run(self) -> None:
        answered = before = time.monotonic()
        while not self._ended.wait(self._seconds()):
            now = time.monotonic()
            if now - before > 3 * self._seconds() + 2:  # this process was stopped, and the others perhaps too
                self._seen = {rank: Seen(seen.beat) for rank, seen in self._seen.items()}
                self._moved_at = now
            before = now
            try:
                with self._lock:
                    if not self._ended.is_set():
                        self._beat()
                        self._look(now)
                answered = time.monotonic()
            except RuntimeError as error:
                if time.monotonic() - answered > STORE_SECONDS and not self._ended.is_set():
                    self._conclude_store(error)
            if self._verdict is not None:
                self._end_with(self._verdict)

    def _beat_now(self) -> None:
        with self._lock, suppress(RuntimeError):  # the thread sees that the store has ended
            self._beat()

    def _beat(self) -> None:
        phase, step, moves, is_limited = signals.place()
        now = time.monotonic()
        if moves != self._moves:
            self._moves, self._moved_at = moves, now
        self._count += 1
        file, line = _innermost(sys._current_frames().get(self._main or 0))
        beat = {
            "count": self._count,
            "host": socket.gethostname(),
            "phase": phase,
            "step": step,
            "still": now - self._moved_at,
            "limited": is_limited and not any(part in file for part in COMPILING),
            "waits": any(part in file for part in WAITING),
            "begun": _collectives_begun(),
            "at": f"{file}:{line}",
        }
        self._store.set(f"beat {self._rank}", json.dumps(beat))

    def _look(self, now: float) -> None:
        """Read what concerns this rank, and find dead and hung ranks."""
        if self._store.check(["verdict"]):
            self._verdict = self._verdict or Verdict(*json.loads(self._store.get("verdict")))
            return
        self._pass_on_signals()
        watched = range(self._ranks) if self._rank == 0 else [0]
        for rank in watched:
            self._read(rank, now)
        for rank in watched:
            if self._verdict is None and rank != self._rank and now - self._seen[rank].since > self._timeout and self._seen[rank].beat:
                self._conclude(rank, f"has given no sign of life for {self._timeout:g} s")
        if self._rank == 0 and self._verdict is None:
            self._find_hung()

    def _read(self, rank: int, now: float) -> None:
        if self._store.check([f"left {rank}"]):
            left = json.loads(self._store.get(f"left {rank}"))
            if left.get("signal"):
                signals.request(left["signal"])
            if left["code"]:
                self._conclude(rank, left["what"], left["code"])
            self._seen[rank].since = float("inf")  # it is done
        elif self._store.check([f"beat {rank}"]):
            self._seen[rank].update(json.loads(self._store.get(f"beat {rank}")), now)

    def _pass_on_signals(self) -> None:
        """Give a signal of this rank to all others, and the other way round."""
        number = signals.received()
        if number is not None and not self._has_passed_on:
            self._has_passed_on = True
            self._store.compare_set("stop", "", str(int(number)))
        elif number is None and self._store.check(["stop"]):
            signals.request(int(self._store.get("stop")))

    def _find_hung(self) -> None:
        """Find a rank that does not get on, unless a rank works alone and the others wait for it."""
        beats = {rank: seen.beat for rank, seen in self._seen.items() if seen.since != float("inf") and seen.beat}
        if not beats or not all(beat["limited"] and beat["still"] > self._timeout for beat in beats.values()):
            return
        busy = {rank: beat for rank, beat in beats.items() if not beat["waits"]} or beats
        # A rank that waits for its device looks busy, too. The one that all wait for has not begun the collective in which they are.
        rank, beat = min(busy.items(), key=lambda item: (int(item[1]["begun"]), -float(item[1]["still"])))
        self._conclude(rank, f"has hung for {beat['still']:.0f} s (dist.timeout_seconds={self._timeout:g}) at {beat['at']}")

    def _find_lost(self) -> None:
        """After a connection has broken: find the rank that has left, or whose heartbeat has stopped."""
        try:
            with self._lock:
                now = time.monotonic()
                if self._store.check(["verdict"]):
                    self._verdict = self._verdict or Verdict(*json.loads(self._store.get("verdict")))
                for rank in range(self._ranks):
                    if self._verdict is None and rank != self._rank:
                        self._read(rank, now)
                        if now - max(self._seen[rank].since, self._lost_at) > LOST_SECONDS * max(1.0, self._seconds()):
                            self._conclude(rank, "has died")
        except RuntimeError as error:
            self._conclude_store(error)

    def _conclude(self, rank: int, what: str, code: int = RANK_EXIT_CODE) -> None:
        """Write the verdict, unless there is one."""
        if self._store.check([f"beat {rank}"]):
            self._seen[rank].beat = json.loads(self._store.get(f"beat {rank}"))
        host, doing = self._of(rank)
        who = "the others" if rank == self._rank else f"rank {self._rank}"
        text = f"rank {rank} ({host}) {what}, while {doing}; {who} waited for it"
        told = rank == 0 and code not in (RANK_EXIT_CODE, 1)  # rank 0 has printed its own error
        verdict = [text, rank, RANK_EXIT_CODE if code == 1 else code, -1 if told else self._rank]
        self._verdict = Verdict(*json.loads(self._store.compare_set("verdict", "", json.dumps(verdict))))

    def _conclude_store(self, error: BaseException) -> None:
        """The store has ended, and with it the rank or the launcher that has it."""
        if self._verdict is None:
            host, doing = self._of(0)
            text = f"rank 0 ({host}) or its launcher has died, while {doing}; rank {self._rank} waited for it"
            self._verdict = Verdict(text, 0, RANK_EXIT_CODE, 1)

    def _of(self, rank: int) -> tuple[str, str]:
        """Return the host of a rank, and what it does or did last, as far as this rank knows.

        A heartbeat may be a second old. All ranks take the same steps together, so a rank for which this one waits is in the same step.
        """
        beat, (phase, step, _, _) = self._seen[rank].beat, signals.place()
        if step <= max(1, int(beat.get("step", 0))):
            phase, step = str(beat.get("phase", "starting")), int(beat.get("step", 0))
        return str(beat.get("host", "?")), f"{phase}, step {step}" if step else phase

    def _end_with(self, verdict: Verdict) -> None:
        """End this process if its main thread does not, for instance because it waits in a collective."""
        if self._ended.wait(GRACE_SECONDS):
            return
        if verdict.teller == self._rank and verdict.code < SAVED_EXIT_CODE:
            os.write(2, f"error: {verdict.text}\n".encode())
        os._exit(verdict.code)


def _innermost(frame: FrameType | None) -> tuple[str, int]:
    return ("?", 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno)


def _collectives_begun() -> int:
    """Return how many collectives of all ranks this one has begun."""
    begun = 0
    for group in [found for found in list(distributed_c10d._world.pg_map) if found.size() == dist.get_world_size()]:
        for device in ("cpu", "cuda"):
            with suppress(RuntimeError):  # a group has no backend for this device
                begun += group._get_backend(torch.device(device))._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return begun


def _end_of(error: BaseException | None) -> tuple[int, str]:
    """Return the exit code of a rank, and what the others say of it."""
    if error is None:
        return 0, ""
    if isinstance(error, Stopped):
        return error.exit_code, "was stopped"
    if isinstance(error, UserError):
        return error.exit_code, f"ended with an error: {error}"
    return 1, f"raised {type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
