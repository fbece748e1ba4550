"""Tricks of programs that try to break out of the sandbox. tests/sandbox/test_tricks.py gives a program this file and the name of one.

Each prints ESCAPED where it was let through, and `refused` where not; or it is ended. `outside` has what it must not reach.
"""

# ruff: noqa: PERF203, SIM115 - a trick that is let through need not be tidy

import asyncio
import ctypes
import fcntl
import mmap
import os
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

outside = SimpleNamespace()  # home, run, secret, unix: paths; port; victim, trainer: processes
libc = ctypes.CDLL(None, use_errno=True)


def attempt(*calls: Callable[[], object]) -> None:
    for call in calls:
        try:
            found = call()
        except (OSError, RuntimeError, ValueError, MemoryError, KeyError) as error:
            print("refused", type(error).__name__)
        else:
            print("ESCAPED", found)


def system_call(number: int, *arguments: int | bytes) -> None:
    if libc.syscall(number, *arguments) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def forks_for_ever() -> None:
    while True:
        if os.fork() == 0:
            os._exit(0)


def forks_on_after_refusals() -> None:
    while True:
        try:
            os.fork()
            print("ESCAPED")
        except OSError:
            pass


def fills_memory() -> None:
    held = []
    while True:
        try:
            held.append(bytearray(10**6))
        except MemoryError:
            attempt(lambda: bytearray(10**7))
            break


def maps_memory() -> None:
    attempt(lambda: mmap.mmap(-1, 2**30))


def keeps_memory_without_an_address() -> None:
    attempt(lambda: os.memfd_create("x"), lambda: system_call(29, 0, 2**30, 0o1600))  # shmget


def writes_a_huge_file() -> None:
    with open("x", "wb") as file:
        for _ in range(100):
            file.write(bytes(10**6))
    print("ESCAPED")


def writes_several_files() -> None:
    for number in range(40):
        with open(f"f{number}", "wb") as file:
            file.write(bytes(10**6))
    time.sleep(0.5)  # where a folder is measured now and then, it ends here
    print("ESCAPED")


def writes_many_files() -> None:
    for number in range(10**5):
        open(f"f{number}", "w").close()
    print("ESCAPED")


def hides_files_below_long_names() -> None:
    for _ in range(20):
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    writes_several_files()


def hides_files_in_a_folder_that_cannot_be_listed() -> None:
    os.mkdir("d", 0o300)
    os.chdir("d")
    writes_several_files()


def hides_files_without_names() -> None:
    held = []
    for number in range(40):
        held.append(open(f"f{number}", "wb"))
        os.remove(f"f{number}")
        held[-1].write(bytes(10**6))
        held[-1].flush()
    time.sleep(0.5)
    print("ESCAPED")


def makes_deep_folders() -> None:
    for _ in range(10**5):
        os.mkdir("d")
        os.chdir("d")
    print("ESCAPED")


def writes_to_the_home_folder() -> None:
    new = f"{outside.home}/new"
    attempt(lambda: open(f"{outside.home}/.bashrc", "a"), lambda: open(new, "w"), lambda: os.mkdir(new), lambda: os.symlink("x", new))


def writes_to_the_temporary_folder() -> None:
    attempt(lambda: open("/tmp/new-file", "w"), lambda: os.mkdir("/tmp/new-folder"), lambda: open("/dev/shm/new", "w"))


def writes_to_etc() -> None:
    attempt(lambda: open("/etc/passwd", "a"), lambda: open("/etc/new", "w"))


def writes_to_the_runs_folder() -> None:
    attempt(lambda: open(f"{outside.run}/config.yaml", "w"), lambda: os.rename(f"{outside.run}/config.yaml", f"{outside.run}/other"))


def writes_to_pythons_libraries() -> None:
    attempt(lambda: open(os.__file__, "a"), lambda: open(os.path.dirname(os.__file__) + "/new.py", "w"))


def deletes_files() -> None:
    attempt(lambda: os.remove(outside.secret), lambda: shutil.rmtree(outside.run), lambda: os.truncate(outside.secret, 0))


def changes_modes_and_owners() -> None:
    path = outside.secret
    attempt(lambda: os.chmod(path, 0o777), lambda: os.chown(path, 1, 1), lambda: os.utime(path), lambda: os.setxattr(path, "user.x", b"x"))


def reads_files_of_the_user() -> None:
    attempt(lambda: open(outside.secret).read(), lambda: os.listdir(outside.home), lambda: open("/etc/passwd").read())


def follows_a_symbolic_link_out() -> None:
    os.symlink(outside.secret, "link")
    attempt(lambda: open("link").read(), lambda: open("link", "a"))


def makes_a_hard_link_out() -> None:
    attempt(lambda: os.link(outside.secret, "link"))


def climbs_by_descriptors() -> None:
    above = os.open("..", os.O_PATH)
    attempt(lambda: os.open("etc/passwd", os.O_RDONLY, dir_fd=above), lambda: os.listdir(f"../..{outside.home}"))


def reads_environment_variables() -> None:
    attempt(lambda: os.environ["MY_TOKEN"], lambda: open("/proc/self/environ").read())


def reads_the_trainers_memory() -> None:
    folder = f"/proc/{outside.trainer}"
    attempt(lambda: open(f"{folder}/environ").read(), lambda: open(f"{folder}/mem", "rb"), lambda: os.listdir("/proc"))


def traces_the_trainer() -> None:
    attempt(lambda: system_call(101, 16, outside.trainer, 0, 0), lambda: system_call(310, outside.trainer, 0, 0, 0, 0, 0))


def kills_others() -> None:
    attempt(*[lambda number=number: os.kill(number, 9) for number in (outside.victim, outside.trainer, os.getppid(), -1)])


def kills_its_group() -> None:
    attempt(lambda: os.killpg(0, 9), lambda: os.kill(0, 9), lambda: os.setpgid(0, outside.victim), lambda: os.setsid())


def kills_as_owner_of_a_file() -> None:
    read, _ = os.pipe()
    attempt(lambda: fcntl.fcntl(read, fcntl.F_SETOWN, outside.victim), lambda: fcntl.fcntl(read, 10, signal.SIGKILL))


def outlives_itself() -> None:
    if os.fork() == 0:
        os.setsid()
        time.sleep(60)


def ignores_signals() -> None:
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    while True:
        pass


def sleeps() -> None:
    while True:
        time.sleep(100)


def prints_for_ever() -> None:
    while True:
        print("x" * 1000)


def writes_for_ever() -> None:
    while True:
        os.write(1, b"x" * 1000)


def runs_other_programs() -> None:
    shell = ["sh", "-c", "curl localhost"]
    attempt(lambda: os.execv("/bin/sh", shell), lambda: subprocess.run(shell), lambda: os.posix_spawn("/bin/sh", shell, {}))


def asks_the_internet() -> None:
    attempt(
        lambda: socket.create_connection(("127.0.0.1", outside.port)),
        lambda: socket.socket(socket.AF_INET6),
        lambda: socket.socket(type=socket.SOCK_DGRAM),
        lambda: asyncio.run(asyncio.open_connection("127.0.0.1", outside.port)),
    )


def asks_other_processes() -> None:
    attempt(lambda: socket.socket(socket.AF_UNIX).connect(outside.unix), lambda: socket.socket(socket.AF_NETLINK))
    attempt(
        lambda: socket.socketpair()[0].connect(outside.unix),
        lambda: socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b"x", outside.unix),
    )


def calls_the_kernel_itself() -> None:
    attempt(lambda: system_call(41, 2, 1, 0), lambda: system_call(56, 17, 0, 0, 0, 0), lambda: system_call(59, b"/bin/true", 0, 0))


def calls_what_is_new_or_rare() -> None:
    # io_uring_setup, bpf, keyctl, perf_event_open, userfaultfd, clone3, pidfd_open, pidfd_send_signal, open_by_handle_at, setns, reboot,
    # seccomp
    numbers = (425, 321, 250, 298, 323, 435, 434, 424, 304, 308, 169, 317)
    attempt(*[lambda number=number: system_call(number, 0, 0, 0, 0, 0) for number in numbers])


def calls_the_kernel_in_32_bits() -> None:
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(bytes.fromhex("b814000000cd80c3"))  # getpid by int 0x80
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    print("ESCAPED", ctypes.CFUNCTYPE(ctypes.c_int)(address)())


def opens_devices() -> None:
    paths = ("/dev/mem", "/dev/kmsg", "/dev/tty", "/dev/ptmx", "/dev/vda", "/dev/fuse")
    attempt(*[lambda path=path: open(path, "rb") for path in paths], lambda: os.mknod("sda", 0o60600, 2048))


def uses_inherited_descriptors() -> None:
    def is_open(number: int) -> bool:
        try:
            return fcntl.fcntl(number, fcntl.F_GETFD) >= 0
        except OSError:
            return False

    found = [number for number in range(4096) if is_open(number)]
    print("refused" if found == [0, 1, 2, 3, 4] else f"ESCAPED {found}")  # input, output, errors, code, done


def raises_its_limits() -> None:
    attempt(
        lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)),
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)),
        lambda: resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (1, 1)),
    )


def starts_threads() -> None:
    for _ in range(1000):
        attempt(lambda: threading.Thread(target=time.sleep, args=(60,)).start())


def makes_new_namespaces() -> None:
    for done in (libc.unshare(0x10000000) == 0, libc.mount(b"x", b".", b"tmpfs", 0, 0) == 0, libc.umount(b"/") == 0):
        print("ESCAPED" if done else "refused")
    attempt(lambda: os.chroot("."))


def crashes() -> None:
    ctypes.string_at(0)


ONLY_ON_X86 = (
    traces_the_trainer, calls_the_kernel_itself, calls_what_is_new_or_rare, calls_the_kernel_in_32_bits, keeps_memory_without_an_address,
)  # fmt: skip
TOOLS = (attempt, system_call)
TRICKS = {
    name: value
    for name, value in list(vars().items())
    if callable(value) and getattr(value, "__module__", "") == __name__ and value not in TOOLS
}
