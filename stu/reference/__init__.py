"""The published models, literally: one function per equation, with the papers' names, on plain tensors.

`stu`, `s4`, `s4d`, `s5`, `lru`, `mamba2`, `gated_deltanet` and `mega` each have a function of the same name, the whole
model read top to bottom: `from stu.reference.s4d import s4d`. They are what the layers of `stu.mixers` are tested
against, and what `experiments.speed` compares them with. Complex parameters are complex tensors here; gradients are
those of autograd.
"""
