// SPDX-License-Identifier: Apache-2.0
// planted_bugs planted|corrected [name…]
#include "planted_bugs.h"

int main(int argc, char** argv) {
    const bool planted = argc > 1 && std::strcmp(argv[1], "planted") == 0;
    std::vector<driver::Case> cases;
    for (const auto& twins : {memory_bugs(), thread_bugs(), host_bugs()}) {
        for (const Twins& t : twins) cases.push_back({t.name, planted ? t.planted : t.corrected});
    }
    return driver::run_cases(cases, argc - 1, argv + 1);
}
