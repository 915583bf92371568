"""A role is taken away and given back on a running stack, and what was when: deploy/stack timeline.

It works in a server of alice's, who may be logged in elsewhere meanwhile.
"""

import json
import re
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from notebook import Notebook  # noqa: E402
from people import Hub, Keycloak, since_1970  # noqa: E402
from refstack.stack import BROKER, Stack  # noqa: E402

USER = "alice"
PATIENCE = 60  # seconds: with the events lost, the recheck still sees it
REST = 5  # seconds without the role


class Timeline:
    """Tells what all parts did, in the order in which they did it."""

    def __init__(self, stack):
        self.audit = stack.dir / "log/audit.jsonl"
        self.told = time.time()
        self.notebook = Notebook(Hub(stack, BROKER), Keycloak(stack), USER)
        _, first, _ = self.notebook.until("== 'token'", self.told, PATIENCE)
        self.start = self.told + first
        self.ours = []

    def play(self):
        self.change(False, "!= 'token'")
        time.sleep(REST)
        self.change(True, "== 'token'")

    def change(self, has, until):
        asked = time.time()
        self.notebook.has_role(has)
        self.ours.append((time.time(), "Keycloak", f"role researcher {'given back to' if has else 'removed from'} {USER}"))
        code, _, _ = self.notebook.until(until, asked, PATIENCE)
        if "still" in code:
            raise SystemExit(f"the notebook sees {code} {PATIENCE} s later")
        time.sleep(0.5)  # an audit line of the same moment
        self.tell()

    def tell(self):
        """Prints what there is since it was last called."""
        until = time.time()
        for at, who, what in sorted(self.ours + self.broker() + self.notebook_was_told()):
            if self.told < at <= until:
                print(f"{at - self.start:5.1f} s  {who:9} {what}", flush=True)
        self.told = until

    def broker(self):
        lines = [json.loads(line) for line in self.audit.read_text().splitlines() if '"action":"roles"' in line]
        return [(since_1970(line["time"]), "broker", re.sub(r"(gone|gained): ; ", "", line["reason"]))
                for line in lines if line["user"] == USER]

    def notebook_was_told(self):
        """What differs from the answer before."""
        answers = json.loads(self.notebook.server.run("import json; print(json.dumps(answers))"))
        return [(at, "notebook", f"refused: {said}" if said else "gets a token, ten times a second")
                for (at, code, said), (_, before, _) in zip(answers[1:], answers) if code != before]


if __name__ == "__main__":
    timeline = Timeline(Stack(sys.argv[1]))
    try:
        timeline.play()
        print("No login, no restart of the server or of the kernel.")
    finally:
        timeline.notebook.has_role(True)
        timeline.notebook.server.end_kernel()
