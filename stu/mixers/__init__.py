"""Mixers: one file each, all with the contract of `stu.mixer.Mixer`."""

from stu.mixers.attention import Attention
from stu.mixers.gated_deltanet import GatedDeltaNet
from stu.mixers.linoss import LinOSS
from stu.mixers.lru import LRU
from stu.mixers.mamba2 import Mamba2
from stu.mixers.mega import Mega
from stu.mixers.rnn import RNN
from stu.mixers.s4 import S4
from stu.mixers.s4d import S4D
from stu.mixers.s5 import S5
from stu.mixers.stu import STU
from stu.mixers.stu_t import STUT

__all__ = ["LRU", "RNN", "S4", "S4D", "S5", "STU", "STUT", "Attention", "GatedDeltaNet", "LinOSS", "Mamba2", "Mega"]
