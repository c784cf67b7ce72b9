// SPDX-License-Identifier: Apache-2.0
// This file is compiled once per instruction set: its name, and the module's entry point under the module's own name.
// The bindings (module.cpp) are compiled only once, which halves the build's time.
typedef struct _object PyObject;
extern "C" PyObject* PyInit__cpu();

#define ENTRY_POINT(name) PyInit_##name
#define ENTRY_POINT_OF(name) ENTRY_POINT(name)

extern "C" __attribute__((visibility("default"))) PyObject* ENTRY_POINT_OF(MEDACCEL_MODULE)() {
    return PyInit__cpu();
}

namespace medaccel {
const char* isa_name() { return MEDACCEL_ISA; }
}  // namespace medaccel
