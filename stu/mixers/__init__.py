"""Mixers: one file each, all with the contract of `stu.mixer.Mixer`."""
