# find_libtorch(HINTS...) makes the target sparse_transcoder::libtorch from the folder of a torch.
#
# find_package(Torch) is not used: beside a CUDA torch it stops unless a CUDA toolkit is installed,
# which neither the headers of torch that are used here nor its libraries need. Torch_DIR comes
# first, then the hints: each may be a torch package, a libtorch, or torch.utils.cmake_prefix_path.
# Sets TORCH_FOLDER and TORCH_VERSION, empty where no torch is found.
function(find_libtorch)
  set(TORCH_FOLDER "" PARENT_SCOPE)
  set(TORCH_VERSION "" PARENT_SCOPE)
  find_path(config TorchConfigVersion.cmake HINTS ${Torch_DIR} ${ARGN}
            PATH_SUFFIXES share/cmake/Torch Torch NO_DEFAULT_PATH NO_CACHE)
  if(NOT config)
    return()
  endif()
  get_filename_component(folder "${config}/../../.." ABSOLUTE)
  include("${config}/TorchConfigVersion.cmake")
  set(TORCH_FOLDER "${folder}" PARENT_SCOPE)
  set(TORCH_VERSION "${PACKAGE_VERSION}" PARENT_SCOPE)
  if(NOT TARGET sparse_transcoder::libtorch)
    add_library(sparse_transcoder::libtorch INTERFACE IMPORTED)
    target_include_directories(sparse_transcoder::libtorch INTERFACE
      "${folder}/include" "${folder}/include/torch/csrc/api/include")
    # libtorch.so is linked although nothing in it is called: it is what loads torch's CUDA part.
    if(NOT APPLE)
      target_link_libraries(sparse_transcoder::libtorch INTERFACE
        "-Wl,--push-state,--no-as-needed \"${folder}/lib/libtorch.so\" -Wl,--pop-state")
    endif()
    foreach(library torch_cpu c10)
      target_link_libraries(sparse_transcoder::libtorch INTERFACE
        "${folder}/lib/lib${library}${CMAKE_SHARED_LIBRARY_SUFFIX}")
    endforeach()
  endif()
endfunction()
