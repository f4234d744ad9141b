"""Applications on top of the library: training classifiers and detectors."""
