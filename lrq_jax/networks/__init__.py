"""Graph builders of known networks, by name."""

from lrq_jax.networks.registry import (
    FAMILIES,
    Network,
    Recipe,
    build_network,
    find_network,
    list_networks,
)

__all__ = ["FAMILIES", "Network", "Recipe", "build_network", "find_network", "list_networks"]
