#include "usual_call.h"

#include <algorithm>
#include <array>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "dlpack.h"

namespace py = pybind11;

namespace bertkern {
namespace {

constexpr char kCapsule[] = "bertkern.usual_call";

enum class Type { kX, kXOrFloat32, kFloat, kMask, kBool, kInt32, kInt64, kId };

struct Size {
  int symbol;  // index of the name
  bool or_one, not_zero;
};

struct Argument {
  Type type;
  bool optional;
  bool one_element = false;  // [*]
  bool leading = false;      // begins with "..."
  std::vector<Size> sizes;
};

constexpr int kRows = 0;  // the symbol "rows"
constexpr size_t kMostNames = 16, kMostLeading = 16;

const dlpack::Exchange* exchange_of(const py::capsule& capsule) {
  auto* exchange = PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule);
  if (exchange == nullptr) throw py::error_already_set();
  return static_cast<const dlpack::Exchange*>(exchange);
}

bool same(dlpack::Element a, dlpack::Element b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

bool is(dlpack::Element e, uint8_t code, uint8_t bits) {
  return e.code == code && e.bits == bits && e.lanes == 1;
}

bool is_float(dlpack::Element e) {
  return is(e, dlpack::kFloat, 16) || is(e, dlpack::kBfloat, 16) || is(e, dlpack::kFloat, 32) ||
         is(e, dlpack::kFloat, 64);
}

bool contiguous(const dlpack::Tensor& t) {
  int64_t stride = 1;
  for (int i = t.dims - 1; i >= 0; --i) {
    if (t.sizes[i] != 1 && t.strides[i] != stride) return false;
    stride *= t.sizes[i];
  }
  return true;
}

bool unit_last_stride(const dlpack::Tensor& t) {
  return t.dims > 0 && (t.strides[t.dims - 1] == 1 || t.sizes[t.dims - 1] == 1);
}

bool empty(const dlpack::Tensor& t) {
  for (int i = 0; i < t.dims; ++i)
    if (t.sizes[i] == 0) return true;
  return false;
}

class Pattern {
 public:
  Pattern(const std::string& text, const py::capsule& exchange, const py::tuple& types,
          const py::object& is_neg)
      : exchange_(exchange_of(exchange)),
        owned_(py::make_tuple(exchange, types, is_neg)),
        types_(types.ptr()),
        is_neg_(is_neg.ptr()),
        requires_grad_(py::str("requires_grad")),
        is_meta_(py::str("is_meta")) {
    std::istringstream all(text);
    for (std::string one; std::getline(all, one, ',');) arguments_.push_back(parse(one));
  }

  Match match(PyObject* const* values, Py_ssize_t count) {
    if (count != static_cast<Py_ssize_t>(arguments_.size())) return kUnusual;
    Bound bound{};
    bound.sizes.fill(-1);
    bool gradient = false;
    for (Py_ssize_t i = 0; i < count; ++i) {
      const Argument& argument = arguments_[i];
      if (values[i] == Py_None) {
        if (!argument.optional) return kUnusual;
        continue;
      }
      dlpack::Tensor t;
      if (!is_known(values[i])) return kUnusual;
      // To be asked for the memory that it does not have, a meta tensor takes a millisecond.
      if (i == 0 && truth(PyObject_GetAttr(values[i], is_meta_.ptr())) != 0) return kUnusual;
      if (!describe(values[i], t)) return kUnusual;
      if (!fits(argument, t, bound)) return kUnusual;
      if (truth(PyObject_Vectorcall(is_neg_, &values[i], 1, nullptr)) != 0) return kUnusual;
      if (gradient) continue;
      const int asks = truth(PyObject_GetAttr(values[i], requires_grad_.ptr()));
      if (asks < 0) return kUnusual;
      gradient = asks == 1;
    }
    return gradient ? kUsualGradient : kUsual;
  }

 private:
  struct Bound {
    std::array<int64_t, kMostNames> sizes;  // of each name; -1: not met yet
    std::array<int64_t, kMostLeading> leading;
    int leading_dims = -1;  // not met yet
    bool has_device = false, has_x = false;
    dlpack::Device device;
    dlpack::Element x;
  };

  Argument parse(const std::string& one) {
    const size_t start = one.find_first_not_of(' '), open = one.find('['), close = one.find(']');
    if (start == std::string::npos || open == std::string::npos || close == std::string::npos ||
        one.find_last_not_of(' ') != close)
      throw std::invalid_argument("pattern: \"" + one + "\" is not type[sizes]");
    std::string type = one.substr(start, open - start);
    Argument argument{};
    argument.optional = !type.empty() && type.back() == '?';
    if (argument.optional) type.pop_back();
    argument.type = type_of(type);
    std::istringstream sizes(one.substr(open + 1, close - open - 1));
    for (std::string name; sizes >> name;) {
      if (name == "*") {
        argument.one_element = true;
      } else if (name == "...") {
        if (argument.leading || !argument.sizes.empty()) misplaced(one);
        argument.leading = true;
      } else {
        Size size{};
        if (name.size() > 2 && name.substr(name.size() - 2) == "|1") {
          size.or_one = true;
          name.resize(name.size() - 2);
        } else if (name.back() == '+') {
          size.not_zero = true;
          name.pop_back();
        }
        if (name.empty() || name[0] == '|') misplaced(one);
        size.symbol = symbol_of(name);
        argument.sizes.push_back(size);
      }
    }
    if (argument.one_element && (argument.leading || !argument.sizes.empty())) misplaced(one);
    return argument;
  }

  [[noreturn]] static void misplaced(const std::string& one) {
    throw std::invalid_argument("pattern: \"" + one + "\" has sizes that mean nothing");
  }

  static Type type_of(const std::string& name) {
    if (name == "x") return Type::kX;
    if (name == "x|float32") return Type::kXOrFloat32;
    if (name == "float") return Type::kFloat;
    if (name == "mask") return Type::kMask;
    if (name == "bool") return Type::kBool;
    if (name == "int32") return Type::kInt32;
    if (name == "int64") return Type::kInt64;
    if (name == "id") return Type::kId;
    throw std::invalid_argument("pattern: \"" + name + "\" is no type");
  }

  int symbol_of(const std::string& name) {
    for (size_t i = 0; i < names_.size(); ++i)
      if (names_[i] == name) return static_cast<int>(i);
    if (names_.size() == kMostNames) throw std::invalid_argument("pattern: too many names");
    names_.push_back(name);
    return static_cast<int>(names_.size()) - 1;
  }

  bool is_known(PyObject* value) const {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(value));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(types_); ++i)
      if (PyTuple_GET_ITEM(types_, i) == type) return true;
    return false;
  }

  bool describe(PyObject* value, dlpack::Tensor& t) const {
    if (exchange_->describe(value, &t) == 0) return t.data != nullptr || empty(t);
    PyErr_Clear();  // sparse, nested, a wrapper of a transform: not memory
    return false;
  }

  static bool fits_type(Type type, const dlpack::Tensor& t, Bound& bound) {
    const dlpack::Element e = t.element;
    const bool is_float32 = is(e, dlpack::kFloat, 32);
    switch (type) {
      case Type::kX:
        if (!bound.has_x) {
          if (!is_float(e)) return false;
          bound.x = e;
          bound.has_x = true;
        }
        return same(e, bound.x) && unit_last_stride(t);
      case Type::kXOrFloat32:
        return (is_float32 || (bound.has_x && same(e, bound.x))) && unit_last_stride(t);
      case Type::kFloat:
        return is_float(e) && unit_last_stride(t);
      case Type::kMask:
        return is_float32 || is(e, dlpack::kBool, 8) || (bound.has_x && same(e, bound.x));
      case Type::kBool:
        return is(e, dlpack::kBool, 8);
      case Type::kInt32:
        return is(e, dlpack::kInt, 32) && contiguous(t);
      case Type::kInt64:
        return is(e, dlpack::kInt, 64) && contiguous(t);
      case Type::kId:
        return (is(e, dlpack::kInt, 32) || is(e, dlpack::kInt, 64)) && contiguous(t);
    }
    return false;
  }

  static bool fits(const Argument& argument, const dlpack::Tensor& t, Bound& bound) {
    if (!bound.has_device) {
      bound.device = t.device;
      bound.has_device = true;
    }
    if (t.device.type != bound.device.type || t.device.index != bound.device.index) return false;
    if (!fits_type(argument.type, t, bound)) return false;
    if (argument.one_element) {
      int64_t elements = 1;
      for (int i = 0; i < t.dims; ++i) elements *= t.sizes[i];
      return elements == 1;
    }
    const int leading = t.dims - static_cast<int>(argument.sizes.size());
    if (leading < 0 || (leading > 0 && !argument.leading)) return false;
    if (argument.leading && !fits_leading(t, leading, bound)) return false;
    for (size_t i = 0; i < argument.sizes.size(); ++i) {
      const Size& wanted = argument.sizes[i];
      const int64_t size = t.sizes[leading + i];
      if (wanted.not_zero && size == 0) return false;
      if (wanted.or_one && size == 1) continue;
      int64_t& known = bound.sizes[wanted.symbol];
      if (known < 0) known = size;
      if (known != size) return false;
    }
    return true;
  }

  static bool fits_leading(const dlpack::Tensor& t, int dims, Bound& bound) {
    if (dims > static_cast<int>(kMostLeading)) return false;
    if (bound.leading_dims < 0) {
      bound.leading_dims = dims;
      std::copy_n(t.sizes, dims, bound.leading.begin());
      bound.sizes[kRows] = 1;
      for (int i = 0; i < dims; ++i) bound.sizes[kRows] *= t.sizes[i];
      return true;
    }
    if (dims != bound.leading_dims) return false;
    for (int i = 0; i < dims; ++i)
      if (t.sizes[i] != bound.leading[i]) return false;
    return true;
  }

  // 1 for True, 0 for False, -1 for anything else and for an error, which is cleared; takes the
  // reference that a call returned.
  static int truth(PyObject* result) {
    if (result == nullptr) PyErr_Clear();
    const int value = result == Py_True ? 1 : result == Py_False ? 0 : -1;
    Py_XDECREF(result);
    return value;
  }

  const dlpack::Exchange* exchange_;
  py::tuple owned_;  // what the raw pointers point into
  PyObject* types_;
  PyObject* is_neg_;
  py::str requires_grad_, is_meta_;
  std::vector<std::string> names_{"rows"};
  std::vector<Argument> arguments_;
};

PyObject* call(PyObject* self, PyObject* const* values, Py_ssize_t count) {
  auto* pattern = static_cast<Pattern*>(PyCapsule_GetPointer(self, kCapsule));
  return pattern == nullptr ? nullptr : PyLong_FromLong(pattern->match(values, count));
}

PyMethodDef kMethod = {"usual_call", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call)),
                       METH_FASTCALL, "0: unusual, 1: usual, 2: usual, with a gradient."};

}  // namespace

py::object usual_call(const std::string& pattern, const py::capsule& exchange,
                      const py::tuple& types, const py::object& is_neg) {
  const dlpack::Exchange* known = exchange_of(exchange);
  if (known->major != dlpack::kMajor || known->describe == nullptr) return py::none();
  auto made = std::make_unique<Pattern>(pattern, exchange, types, is_neg);
  py::capsule self(made.get(), kCapsule, [](PyObject* capsule) {
    delete static_cast<Pattern*>(PyCapsule_GetPointer(capsule, kCapsule));
  });
  made.release();
  PyObject* function = PyCFunction_New(&kMethod, self.ptr());
  if (function == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(function);
}

}  // namespace bertkern
