#include "machine/places.h"

#include <dlfcn.h>
#include <link.h>

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

extern "C" const char __ehdr_start[] __attribute__((visibility("hidden")));  // of the linker

namespace bertkern::emulator {
namespace {

struct Segment {
  uintptr_t first, bytes;
};

// The parts of this module that the loader mapped.
const std::vector<Segment>& segments() {
  static const std::vector<Segment> found = [] {
    std::vector<Segment> list;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
          std::vector<Segment> loaded;
          bool ours = false;
          const auto start = reinterpret_cast<uintptr_t>(__ehdr_start);
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const ElfW(Phdr) & header = info->dlpi_phdr[i];
            if (header.p_type != PT_LOAD) continue;
            loaded.push_back({info->dlpi_addr + header.p_vaddr, header.p_memsz});
            ours = ours || start - loaded.back().first < loaded.back().bytes;
          }
          if (ours) *static_cast<std::vector<Segment>*>(data) = loaded;
          return ours ? 1 : 0;
        },
        &list);
    return list;
  }();
  return found;
}

// "/…/csrc/cuda/x.cuh:12 (discriminator 2)" as "x.cuh:12"; empty for a function of ptx/.
std::string short_line(std::string line) {
  const size_t remark = line.find(" (");
  if (remark != std::string::npos) line.resize(remark);
  if (line.find("/ptx/") != std::string::npos) return "";
  const size_t slash = line.rfind('/');
  return slash == std::string::npos ? line : line.substr(slash + 1);
}

}  // namespace

uint32_t place_of(const void* return_address) {
  return static_cast<uint32_t>(static_cast<const char*>(return_address) - __ehdr_start);
}

bool is_constant(uintptr_t address, size_t bytes) {
  for (const Segment& segment : segments()) {
    const uintptr_t offset = address - segment.first;
    if (offset < segment.bytes && bytes <= segment.bytes - offset) return true;
  }
  return false;
}

std::string where(uint32_t place) {
  char offset[32];
  std::snprintf(offset, sizeof(offset), "0x%x", place - 1);  // inside the call
  Dl_info info;
  if (dladdr(__ehdr_start, &info) == 0) return offset;
  const std::string command =
      std::string("addr2line -i -e '") + info.dli_fname + "' " + offset + " 2>/dev/null";
  const std::unique_ptr<FILE, int (*)(FILE*)> output(popen(command.c_str(), "r"), &pclose);
  std::string text;
  char line[4096];
  while (output != nullptr && std::fgets(line, sizeof(line), output.get()) != nullptr) {
    std::string part = line;
    part.erase(part.find_last_not_of('\n') + 1);
    part = short_line(part);
    if (part.empty() || part.find('?') != std::string::npos) continue;
    text += text.empty() ? part : " in " + part;
  }
  return text.empty() ? std::string(info.dli_fname) + "+" + offset : text;
}

}  // namespace bertkern::emulator
