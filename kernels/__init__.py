"""The sparse feed-forward network: one folder for each family of kernels, with a plain PyTorch reference.

A family's reference is its specification and its CPU path. `family` defines the interface of a family; `feed_forward`
has the six matrix products of a squared-ReLU FFN and chooses the family that computes them:

    masked           dense products over masked operands, correct for any pattern on any device
    two_four         2:4 weights (S-STE) and activations, packing and products on the sparse tensor cores
    venom            V:N:M activations, their compact form and products; as a pattern 2:4 is V=1, N=2, M=4
    groups           column groups, V tokens x G neurons
    columns          column groups for large blocks, down to single neurons: a dense FFN of each block's neurons
    experts          routed experts, whose blocks of tokens never cross experts
    clustering       clusters neurons or tokens, once, and assigns tokens to clusters, every step
    causal           patterns for inference, chosen from earlier tokens
    feed_forward     products (1) to (6), forward and backward
"""

from kernels.causal import Preceding
from kernels.clustering import activation_clusters, balanced_clusters, permute_rows, route_tokens, token_clusters
from kernels.family import Cost, Family, FeedForwardSparsity, Pattern, Shape
from kernels.feed_forward import MASKED, choose, explain, hidden_activations, prefer, sparse_feed_forward
from kernels.groups import Groups, group_mask
from kernels.two_four.reference import soft_threshold_2_4, soft_threshold_scale
from kernels.venom import Venom, venom_mask

# Hugging Face ships a package of the same name, and transformers probes for it. A version below every one it
# asks for makes it leave ours alone.
__version__ = "0.0.0"

__all__ = [
    "MASKED",
    "Cost",
    "Family",
    "FeedForwardSparsity",
    "Groups",
    "Pattern",
    "Preceding",
    "Shape",
    "Venom",
    "activation_clusters",
    "balanced_clusters",
    "choose",
    "explain",
    "group_mask",
    "hidden_activations",
    "permute_rows",
    "prefer",
    "route_tokens",
    "soft_threshold_2_4",
    "soft_threshold_scale",
    "sparse_feed_forward",
    "token_clusters",
    "venom_mask",
]
