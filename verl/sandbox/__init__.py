"""Run a model's Python programs so that they can harm nothing: start at `sandbox.Sandbox`.

Each program is one process without other threads. Two things hold it, and the kernel enforces both:

- a wall around files (`walls`): namespaces of its own (`mounts`), in which nothing but Python's libraries and an empty folder in memory
  exists, or Landlock (`landlock`), which refuses all other files;
- a list of system calls (`seccomp`): what is not on it, such as starting a process, opening a socket or sending a signal, is refused.

Without one of the walls, or without seccomp, there is no sandbox: an error says what the system lacks. Before the first program runs, a
program of ours tries to break out (`probe`), and the sandbox is refused if it succeeds.

`fork_server` is the process that starts and watches programs, and `program` what runs in each.
"""
