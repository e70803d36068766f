"""What the server of processes has ready for every run that it forks: imports, and the parsers of Hydra, warm.

What of it depends on the environment or the command line, `tests.runs` imports anew in each run.
"""

import gc
from importlib import import_module
from pkgutil import walk_packages

import hydra._internal.core_plugins
from hydra.core.singleton import Singleton

import data
import train
from stu.cli import composition
from tests import runs

for package in (hydra._internal.core_plugins, data):
    for module in walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
for name in train.training.__all__:
    getattr(train.training, name)

state = Singleton.get_state()
composition.composed((*runs.SMALL_RUN, "task=lds", "model=stu", "+optimizer.groups.a={lr: 1, match: b}"))
Singleton.set_state(state)  # as every run looks for plugins itself
gc.collect()
gc.freeze()  # the collector leaves alone, and so does not copy, what the runs share
