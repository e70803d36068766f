"""The six tasks of the Long Range Arena (2011.04006)."""
