"""Plain PyTorch definition of every op: the truth that the kernels are held to.

Differentiable to any order, on any device, in float64 when the inputs are. The functions have the
names and arguments of every other backend's (`kernels/`, `ops/_cpu.py`, `ops/_cuda.py`), so this
room is also the backend "reference". Statistics, softmax and dropout are computed in float32
(float64 for float64 inputs); the cast to the inputs' dtype stands at the end. The backward formulas
recompute what they need from the primal inputs, so that autograd through them gives the gradients
of gradients.
"""
