"""Array primitives that know nothing of networks: convolutions, upsampling, rounding."""
