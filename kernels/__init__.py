"""Triton kernels, forward and backward, for every GPU that Triton serves and for its interpreter.

Contents (nothing is imported here: Triton is loaded only by the file that is used):

    attention.py    softmax(q kᵀ) v with causal, key lengths, varlen, dropout and lse: its launches
                    (kernels: attention_fwd.py, attention_bwd.py; both use attention_tile.py)
    layer_norm.py   layer_norm and dropout_add_layer_norm
    linear.py       the GEMM family: bias, activation, dropout and residual in the epilogue
    ffn.py          the feed-forward network as two calls of that family
    linear_cross_entropy.py     the loss of a linear layer's logits, which are never held whole
    dropout.py      the generator of dropout bits, and elementwise dropout
    tuning.py       tile sizes, warps and stages as one table
    device.py       what a launch needs to know of the device

Only `bertkern.ops` imports these files. Their launchers take tensors that are already checked.
"""
