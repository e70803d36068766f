"""Whether Slepian filters suit systems with complex eigenvalues: `python -m experiments.complex_spectra`."""
