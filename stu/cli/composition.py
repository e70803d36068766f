"""From words to a configuration, and from its nodes to what they make, under every version of Hydra."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import copy
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, flag_override

from stu.cli import layers
from stu.cli.check import calls
from stu.cli.usage import CONF

WHITELIST = "_execution_whitelist_"  # from Hydra 1.4 on: which packages a configuration may call
HAS_WHITELIST = WHITELIST in inspect.signature(instantiate).parameters
# The behaviour that conf/ is written for: Hydra 1.3 asks for it, 1.4 has no other and warns of the question.
VERSION: dict[str, Any] = {} if HAS_WHITELIST else {"version_base": "1.3"}
TEST_LENGTHS = "test_lengths"
layers.install()


def command(job: Callable[[DictConfig], Any]) -> Callable[[], Any]:
    """The command that runs `job` with the configuration that its words choose from conf/."""
    # for the calls that Hydra makes itself: of callbacks
    trusted: dict[str, Any] = {"execution_whitelist": ["stu.*"]} if HAS_WHITELIST else {}
    return hydra.main(config_path=str(CONF), config_name="config", **VERSION, **trusted)(job)


def composed(overrides: Sequence[str], *, with_hydra: bool = False) -> DictConfig:
    """The configuration of `python train.py overrides`; with_hydra: with the node in which Hydra keeps its own."""
    initialized = GlobalHydra.instance().is_initialized()  # by `command`, with the same folder
    with nullcontext() if initialized else initialize_config_dir(str(CONF), **VERSION):
        return compose("config", overrides=list(overrides), return_hydra_config=with_hydra)


def build(node: Any, **keywords: Any) -> Any:
    """Call what the node and those inside it name; `keywords` are added to its own.

    The packages that they name may be called, for a configuration is the command of its user; what Hydra never calls,
    such as `os.system`, it refuses all the same. `test_lengths`, which every task may have, is no argument of any.
    """
    if isinstance(node, DictConfig) and TEST_LENGTHS in node:
        bare = copy(node)
        with flag_override(bare, ["struct", "readonly"], False):
            lengths = tuple(bare.pop(TEST_LENGTHS))
        made = build(bare, **keywords)
        made.test_lengths = lengths
        return made
    if HAS_WHITELIST:
        plain = OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node
        packages = {str(call["_target_"]).partition(".")[0] for _, call in calls(plain)}
        keywords[WHITELIST] = [f"{package}.*" for package in sorted(packages)]
    return instantiate(node, **keywords)
