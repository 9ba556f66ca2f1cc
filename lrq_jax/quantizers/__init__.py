"""Affine quantization: codes, scales, zero points; and the observers that find ranges."""
