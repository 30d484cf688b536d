# Chooses whether the CUDA kernels are compiled, and by which nvcc. Sets CUDA_KERNELS, and enables
# the language CUDA where it is TRUE.
set(SPARSE_TRANSCODER_CUDA AUTO CACHE STRING
    "ON, OFF, or AUTO: ON where torch has CUDA and an nvcc of its major version compiles")
set(CUDA_KERNELS FALSE)

set(torch_cuda "")
if(EXISTS "${TORCH_FOLDER}/version.py")
  file(STRINGS "${TORCH_FOLDER}/version.py" torch_cuda REGEX "^cuda[: ].*'[0-9.]+'")
  string(REGEX MATCH "[0-9]+\\.[0-9]+" torch_cuda "${torch_cuda}")
endif()
string(REGEX MATCH "^[0-9]+" cuda_major "${torch_cuda}")

if(NOT EXISTS "${CMAKE_CUDA_COMPILER}")
  # An earlier run found none, or one that is gone by now. CMake keeps what it learned of it.
  unset(CMAKE_CUDA_COMPILER CACHE)
  file(REMOVE ${CMAKE_PLATFORM_INFO_DIR}/CMakeCUDACompiler.cmake)
endif()
set(nvcc "${CMAKE_CUDA_COMPILER}")
if(torch_cuda AND SPARSE_TRANSCODER_CUDA AND NOT nvcc)
  execute_process(COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/find_nvcc.py ${cuda_major}
                  OUTPUT_VARIABLE nvcc OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()

set(no_kernels "")
if(NOT SPARSE_TRANSCODER_CUDA)
  set(no_kernels "SPARSE_TRANSCODER_CUDA is ${SPARSE_TRANSCODER_CUDA}")
elseif(NOT torch_cuda)
  set(no_kernels "torch ${TORCH_VERSION} was built without CUDA")
elseif(NOT nvcc)
  string(CONCAT no_kernels
    "torch ${TORCH_VERSION} has CUDA ${torch_cuda}, and no nvcc of CUDA ${cuda_major} was found; "
    "to get one: pip install \"cuda-toolkit[nvcc,crt,nvvm,cccl]==${torch_cuda}.*\"")
else()
  # A toolkit of pip's has its libraries in lib, and nvcc looks for them in lib64.
  get_filename_component(cuda_folder "${nvcc}/../.." ABSOLUTE)
  if(NOT EXISTS "${cuda_folder}/lib64" AND EXISTS "${cuda_folder}/lib")
    set(ENV{CUDAFLAGS} "-L${cuda_folder}/lib $ENV{CUDAFLAGS}")
  endif()
  set(ENV{CUDACXX} "${nvcc}")
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
    # Each generation of GPUs runs its own code, whichever is here; later ones translate the PTX.
    if(cuda_major GREATER_EQUAL 13)
      set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 90-real 100-real 120)
    else()
      set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 90)
    endif()
  endif()
  if(SPARSE_TRANSCODER_CUDA STREQUAL "AUTO")
    include(CheckLanguage)
    check_language(CUDA)
    if(NOT CMAKE_CUDA_COMPILER)
      set(no_kernels "${nvcc} does not compile here; SPARSE_TRANSCODER_CUDA=ON shows why")
    endif()
  endif()
  if(NOT no_kernels)
    enable_language(CUDA)
    set(CUDA_KERNELS TRUE)
  endif()
endif()

if(CUDA_KERNELS)
  message(STATUS "CUDA kernels: for ${CMAKE_CUDA_ARCHITECTURES}, by ${CMAKE_CUDA_COMPILER} "
                 "${CMAKE_CUDA_COMPILER_VERSION}")
elseif(SPARSE_TRANSCODER_CUDA AND NOT SPARSE_TRANSCODER_CUDA STREQUAL "AUTO")
  message(FATAL_ERROR "SPARSE_TRANSCODER_CUDA is ${SPARSE_TRANSCODER_CUDA}, but ${no_kernels}")
else()
  message(STATUS "CUDA kernels: none, ${no_kernels}")
endif()
