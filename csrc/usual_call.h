// Whether an op's tensors are what they usually are, asked in one step before the op checks them
// one by one in Python.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace bertkern {

// What a matcher returns.
enum Match : long {
  kUnusual = 0,       // something differs: the op's own checks find out what
  kUsual = 1,         // as the pattern says, and no tensor asks for a gradient
  kUsualGradient = 2  // as the pattern says, and a tensor asks for a gradient
};

// A function of as many tensors (or None) as `pattern` names, which returns a Match; None where the
// exchange interface is of a version that is not known.
//
// pattern: "x[... k], x[n k], x|float32?[n], int64?[rows]", for each tensor its type, "?" where it
// may be None, and its sizes.
//   types: x, one float dtype for all of them; x|float32; float (any); mask (bool, x or float32);
//          bool; int32; int64; id (int32 or int64). float16, bfloat16, float32, float64 are floats.
//   sizes: a name stands for one size wherever it occurs; "name+" is at least 1, "name|1" may also
//          be 1; "..." stands for the same sizes wherever it occurs, and "rows" for their product;
//          [*] is any shape of one element.
// All are on one device. Floats have a last stride of 1, int32, int64 and id are contiguous.
// exchange: torch.Tensor.__dlpack_c_exchange_api__. types: the exact types that are taken.
// is_neg: torch.Tensor.is_neg; a tensor whose sign is only noted is unusual.
pybind11::object usual_call(const std::string& pattern, const pybind11::capsule& exchange,
                            const pybind11::tuple& types, const pybind11::object& is_neg);

}  // namespace bertkern
