// Places in the code and in the data of this module.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace bertkern::emulator {

// A return address as an offset in this module, and back as the source lines of the call: the
// innermost first, then where that was inlined; functions of csrc/ptx left out.
uint32_t place_of(const void* return_address);
std::string where(uint32_t place);

// Whether bytes are data of this module: constants that the compiler put there.
bool is_constant(uintptr_t address, size_t bytes);

}  // namespace bertkern::emulator
