// SPDX-License-Identifier: Apache-2.0
// The order in which blocks, and the threads of a block, take their turns: MEDACCEL_EMU_ORDER=fwd|rev|randN.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace medaccel::emulation {

class Order {
  public:
    static Order from_environment() {
        const char* value = std::getenv("MEDACCEL_EMU_ORDER");
        return Order(value ? value : "fwd");
    }

    explicit Order(const std::string& name) {
        if (name == "fwd") return;
        if (name == "rev") {
            kind_ = Kind::reverse;
            return;
        }
        const std::string digits = name.substr(0, 4) == "rand" ? name.substr(4) : "";
        if (digits.empty() || digits.size() > 9 || digits.find_first_not_of("0123456789") != std::string::npos) {
            throw std::invalid_argument("MEDACCEL_EMU_ORDER is '" + name +
                                        "' (expected fwd, rev, or rand and a number, as in rand1)");
        }
        kind_ = Kind::random;
        random_.seed(static_cast<std::uint32_t>(std::stoul(digits)));
    }

    // Is called once per launch.
    void begin(std::uint64_t blocks, unsigned threads) {
        blocks_ = blocks;
        threads_.resize(threads);
        std::iota(threads_.begin(), threads_.end(), 0u);
        if (kind_ == Kind::reverse) std::reverse(threads_.begin(), threads_.end());
        if (kind_ != Kind::random) return;
        // k → (factor · k + offset) mod blocks is a permutation where factor and blocks have no common
        // divisor.
        do {
            factor_ = blocks > 2 ? 1 + random_() % (blocks - 1) : 1;
        } while (std::gcd(factor_, blocks) != 1);
        offset_ = random_() % blocks;
    }

    // The block whose turn is the k-th.
    std::uint64_t block(std::uint64_t k) const {
        if (kind_ == Kind::reverse) return blocks_ - 1 - k;
        return static_cast<std::uint64_t>((static_cast<unsigned __int128>(factor_) * k + offset_) % blocks_);
    }

    // The threads of the next block, in turn.
    const std::vector<unsigned>& threads() {
        if (kind_ == Kind::random) std::shuffle(threads_.begin(), threads_.end(), random_);
        return threads_;
    }

  private:
    enum class Kind { forward, reverse, random };
    Kind kind_ = Kind::forward;
    std::mt19937 random_;
    std::vector<unsigned> threads_;
    std::uint64_t blocks_ = 1, factor_ = 1, offset_ = 0;
};

}  // namespace medaccel::emulation
