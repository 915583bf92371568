"""The few things we ask of Docker, through its command."""

import json
import subprocess


def docker(*args, check=True):
    """Run one docker command and return what it printed."""
    done = subprocess.run(["docker", *map(str, args)], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"docker {' '.join(map(str, args))}: {done.stderr.strip()}")
    return done.stdout.strip()


def inspect(*names):
    return json.loads(docker("inspect", *names))


def containers(label):
    """IDs of all containers with a label, stopped ones too."""
    return docker("ps", "--all", "--quiet", "--no-trunc", "--filter", f"label={label}").split()
