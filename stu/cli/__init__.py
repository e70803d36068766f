"""The command line, all that the library knows of Hydra: help, checks of a configuration, errors, threads."""
