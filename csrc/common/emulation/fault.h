// SPDX-License-Identifier: Apache-2.0
// The emulator's exceptions and their messages.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

namespace medaccel::emulation {

// A place in the kernel's source. Device functions take one as their last, defaulted argument: it is the
// caller's.
struct Site {
    const char* file = "?";
    int line = 0;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
    bool operator==(const Site& other) const {
        return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
    }
    std::string text() const { return std::string(file) + ":" + std::to_string(line); }
};

// A fault that hardware would answer with a hang, with undefined values or not at all. `kind` is one of
// "barrier divergence", "deadlock", "wrong lane mask", "wrong stream", "wrong device", "invalid use".
class KernelFault : public std::runtime_error {
  public:
    KernelFault(std::string kind, const std::string& what_happened)
        : std::runtime_error(kind + ": " + what_happened), kind_(std::move(kind)) {}
    const std::string& kind() const { return kind_; }

  private:
    std::string kind_;
};

}  // namespace medaccel::emulation
