"""Processes that outlive the program that started them, stopped by PID."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path


class Gone(Exception):
    """A process ended that should be running."""


def wait_for(what, condition, seconds=60, alive=()):
    """Ask condition until it answers something true, and return that.

    The processes in alive must keep running meanwhile.
    """
    deadline = time.monotonic() + seconds
    while True:
        answer = condition()
        if answer:
            return answer
        for process in alive:
            if not process.running():
                raise Gone(f"{process.name} ended while we waited for {what}:\n{process.tail()}")
        if time.monotonic() > deadline:
            tails = "\n".join(process.tail() for process in alive)
            raise TimeoutError(f"no {what} within {seconds} s\n{tails}")
        time.sleep(0.05)


def started_at(pid):
    """When a PID's process started, in ticks since boot; None if there is none.

    A PID may be somebody else's by the time we want to stop it; PID and start
    together are not. A zombie counts as none.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


class Process:
    """One program of the stack: its command line, log and PID file."""

    def __init__(self, name, run, logs, argv, env=None, cwd="/"):
        self.name = name
        self.argv = [str(arg) for arg in argv]
        self.env = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "TMPDIR")}
        self.env.update(env or {})
        self.cwd = cwd
        self.log = Path(logs) / f"{name}.log"
        self.pidfile = Path(run) / f"{name}.pid"

    def start(self):
        with open(self.log, "ab") as log:
            os.chmod(self.log, 0o600)
            child = subprocess.Popen(
                self.argv, env=self.env, cwd=self.cwd, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )
        self.pidfile.write_text(json.dumps({"pid": child.pid, "started": started_at(child.pid)}))
        child.returncode = 0  # we reap it ourselves, if we still run when it ends

    @property
    def pid(self):
        """The PID, if that process still runs."""
        try:
            known = json.loads(self.pidfile.read_text())
        except FileNotFoundError:
            return None
        self._reap(known["pid"])
        return known["pid"] if started_at(known["pid"]) == known["started"] else None

    def running(self):
        return self.pid is not None

    def stop(self, sig=signal.SIGTERM, seconds=20):
        """End the process and wait until it is gone."""
        pid = self.pid
        if pid is not None:
            os.kill(pid, sig)
            try:
                wait_for(f"end of {self.name}", lambda: not self.running(), seconds)
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                wait_for(f"end of {self.name}", lambda: not self.running(), seconds)
        self.pidfile.unlink(missing_ok=True)

    def tail(self, lines=25):
        try:
            text = self.log.read_text(errors="replace")
        except FileNotFoundError:
            text = ""
        return "\n".join([f"--- {self.log}"] + text.splitlines()[-lines:])

    @staticmethod
    def _reap(pid):
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            pass  # not our child: another run of this program started it
