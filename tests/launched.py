"""Scripts that tests start as processes of their own."""

import subprocess

# What torch 2.13's threads say where a process that used Gloo ends in an unlucky moment, after its
# work: seen twice in some twenty runs on a machine with three times its load.
TORN_DOWN = "terminate called without an active exception"


def run(command, **settings):
    """``subprocess.run`` with text; once more if torch tore itself down."""
    settings = {"capture_output": True, "text": True, "timeout": 300, "check": False, **settings}
    done = subprocess.run(command, **settings)
    if done.returncode != 0 and TORN_DOWN in done.stderr:
        done = subprocess.run(command, **settings)
    return done
