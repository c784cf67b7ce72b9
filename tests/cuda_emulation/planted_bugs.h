// SPDX-License-Identifier: Apache-2.0
// A planted bug and its corrected twin are one function template, which differs by the bug alone.
#pragma once

#include "driver.h"

struct Twins {
    const char* name;
    void (*planted)();
    void (*corrected)();
};

#define TWINS(function) {#function, function<true>, function<false>}

std::vector<Twins> memory_bugs();
std::vector<Twins> thread_bugs();
std::vector<Twins> host_bugs();
