"""How fast each mixer is, and how much memory it takes: `python -m experiments.speed`."""

from stu.cli.threads import wait_briefly

wait_briefly()  # as train.py does
