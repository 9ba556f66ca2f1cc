"""Zero-shot quantization of image classifiers to real 2-8 bit integers, in JAX."""

__version__ = "0.1.0"
