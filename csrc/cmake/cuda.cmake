# SPDX-License-Identifier: Apache-2.0
# The module `_cuda`: kernels of csrc/*/cuda.cu for each architecture. Found by nvcc alone; no GPU, no driver, no torch.
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(MEDACCEL_CUDA STREQUAL "1")
    message(FATAL_ERROR
      "MEDACCEL_CUDA=1 asks for the CUDA kernels, but no nvcc was found. Install the CUDA toolkit and put nvcc on "
      "PATH (or set CUDACXX), or build without the kernels: MEDACCEL_CUDA=0.")
  endif()
  message(STATUS "CUDA kernels: not built (no nvcc found)")
  return()
endif()

set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)  # no libcudart to find at run time; imports on a machine without a driver
enable_language(CUDA)

set(CUDA_FOLDERS diffusion_step gaussian instance_norm probe)
list(TRANSFORM CUDA_FOLDERS APPEND /cuda.cu OUTPUT_VARIABLE CUDA_SOURCES)
list(TRANSFORM CUDA_FOLDERS APPEND /bind_cuda.cpp OUTPUT_VARIABLE CUDA_BINDINGS)

# Machine code for each architecture, and PTX of the last, so that later GPUs can compile it themselves.
set(gpu_code "")
foreach(arch IN LISTS MEDACCEL_CUDA_ARCHS)
  list(APPEND gpu_code ${arch}-real)
  set(newest ${arch})
endforeach()
list(APPEND gpu_code ${newest}-virtual)

string(REPLACE ";" "," arch_list "${MEDACCEL_CUDA_ARCHS}")  # a semicolon would end a definition
pybind11_add_module(_cuda MODULE NO_EXTRAS cuda_module.cpp ${CUDA_BINDINGS} ${CUDA_SOURCES})
set_target_properties(_cuda PROPERTIES CUDA_ARCHITECTURES "${gpu_code}" CUDA_VISIBILITY_PRESET hidden)
target_compile_options(_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CXX>:-O1 -Wall -Wextra>
  $<$<COMPILE_LANGUAGE:CUDA>:-O3 --threads=4>
  $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${MEDACCEL_WERROR}>>:-Werror=all-warnings>)
target_compile_definitions(_cuda PRIVATE
  MEDACCEL_MODULE=_cuda MEDACCEL_CUDA_ARCHS="${arch_list}"
  MEDACCEL_CUDA_VERSION="${CMAKE_CUDA_COMPILER_VERSION}")
target_link_options(_cuda PRIVATE -s -Wl,--exclude-libs,ALL)
install(TARGETS _cuda LIBRARY DESTINATION medaccel)
message(STATUS "CUDA kernels: nvcc ${CMAKE_CUDA_COMPILER_VERSION}, architectures ${gpu_code}")
