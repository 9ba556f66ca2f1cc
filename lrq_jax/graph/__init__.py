"""A network is data: immutable layers, a checked graph, a builder and its JSON form."""

from lrq_jax.graph.builder import GraphBuilder
from lrq_jax.graph.layers import INPUT, GraphError
from lrq_jax.graph.network import Graph
from lrq_jax.graph.serialization import graph_from_dict, graph_to_dict

__all__ = ["INPUT", "Graph", "GraphBuilder", "GraphError", "graph_from_dict", "graph_to_dict"]
