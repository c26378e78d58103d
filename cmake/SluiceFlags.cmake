# Compiler flags, and the two functions every folder's CMakeLists.txt is written with.
add_library(sluice_flags INTERFACE)
target_compile_definitions(sluice_flags INTERFACE _GNU_SOURCE SLUICE_VERSION="${PROJECT_VERSION}")
target_include_directories(sluice_flags INTERFACE ${PROJECT_SOURCE_DIR})
target_compile_options(sluice_flags INTERFACE
  $<$<COMPILE_LANGUAGE:C>:-Wall;-Wextra;-Wpedantic;-Wshadow;-Wstrict-prototypes;-Wmissing-prototypes;-Wvla;-Wundef;-Wformat=2;-Wdouble-promotion;-Wconversion;-Wno-sign-conversion;-fno-common>
  # what gcc finds there depends on the optimiser and the sanitizer; a text cut by snprintf is cut on purpose
  $<$<C_COMPILER_ID:GNU>:-Wno-format-truncation>
  $<$<AND:$<COMPILE_LANGUAGE:C>,$<BOOL:${SLUICE_WERROR}>>:-Werror>)
if(SLUICE_SANITIZE STREQUAL "address")
  set(san -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer)
elseif(SLUICE_SANITIZE STREQUAL "thread")
  set(san -fsanitize=thread -fno-omit-frame-pointer)
elseif(SLUICE_SANITIZE)
  message(FATAL_ERROR "SLUICE_SANITIZE: '${SLUICE_SANITIZE}' is not address or thread")
endif()
if(SLUICE_FUZZ)
  list(APPEND san -fsanitize=fuzzer-no-link) # coverage of the libraries, which steers the fuzzer
endif()
target_compile_options(sluice_flags INTERFACE ${san})
target_link_options(sluice_flags INTERFACE ${san})

# sluice_library(core SOURCES a.c b.c LINK x): static library sluice_core.
function(sluice_library name)
  cmake_parse_arguments(A "" "" "SOURCES;LINK" ${ARGN})
  add_library(sluice_${name} STATIC ${A_SOURCES})
  target_link_libraries(sluice_${name} PUBLIC sluice_flags ${A_LINK})
endfunction()

# sluice_cuda_flags(sluice_kvcache_cuda): kernels of that library must not warn, spill or be serialised.
function(sluice_cuda_flags target)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-lineinfo;-Xptxas=--warn-on-spills;-Werror=all-warnings>)
  set_property(TARGET ${target} PROPERTY CUDA_COMPILER_LAUNCHER ${PROJECT_SOURCE_DIR}/cmake/nvcc_strict.sh)
endfunction()

# sluice_program(sluiced SOURCES daemon.c LINK sluice_scheduler): program in build/<preset>/bin.
function(sluice_program name)
  cmake_parse_arguments(A "" "" "SOURCES;LINK" ${ARGN})
  add_executable(${name} ${A_SOURCES})
  target_link_libraries(${name} PRIVATE sluice_flags ${A_LINK})
endfunction()

# sluice_test(kv_blocks LINK sluice_kvcache [SOURCES extra.c] [LABELS slow] [TIMEOUT 60] [ARGS ...]):
# test_kv_blocks from test_kv_blocks.c, one process; exit code 77 means skipped.
function(sluice_test name)
  cmake_parse_arguments(A "" "TIMEOUT" "SOURCES;LINK;LABELS;ARGS" ${ARGN})
  if(NOT A_TIMEOUT)
    set(A_TIMEOUT 60)
  endif()
  if(SLUICE_SANITIZE) # sanitized code runs several times slower
    math(EXPR A_TIMEOUT "${A_TIMEOUT} * 5")
  endif()
  if(NOT A_LABELS)
    set(A_LABELS unit)
  endif()
  add_executable(test_${name} test_${name}.c ${A_SOURCES})
  target_link_libraries(test_${name} PRIVATE sluice_flags ${A_LINK} sluice_cmocka m)
  target_compile_definitions(test_${name} PRIVATE TEST_DATA="${PROJECT_SOURCE_DIR}/tests/data"
    TEST_BIN="${CMAKE_BINARY_DIR}/bin" TEST_ROOT="${PROJECT_SOURCE_DIR}")
  add_test(NAME ${name} COMMAND test_${name} ${A_ARGS})
  set_tests_properties(${name} PROPERTIES TIMEOUT ${A_TIMEOUT} LABELS "${A_LABELS}" SKIP_RETURN_CODE 77)
  if(process IN_LIST A_LABELS OR e2e IN_LIST A_LABELS) # they wait for each other by the clock
    set_tests_properties(${name} PROPERTIES RUN_SERIAL TRUE)
  endif()
  if(thread IN_LIST A_LABELS OR process IN_LIST A_LABELS)
    add_dependencies(threaded test_${name})
  endif()
  if(gpu IN_LIST A_LABELS)
    add_dependencies(gpu test_${name})
    set_tests_properties(${name} PROPERTIES RUN_SERIAL TRUE)
  endif()
endfunction()

# sluice_fuzz(frame LINK sluice_ipc [SOURCES extra.c]): fuzz_frame from tests/fuzz_frame.c, which defines
# LLVMFuzzerTestOneInput. Only in the fuzz preset; its seeds, if any, are in tests/data/fuzz_frame/.
function(sluice_fuzz name)
  cmake_parse_arguments(A "" "" "SOURCES;LINK" ${ARGN})
  if(SLUICE_FUZZ)
    add_executable(fuzz_${name} ${PROJECT_SOURCE_DIR}/tests/fuzz_${name}.c ${A_SOURCES})
    target_link_libraries(fuzz_${name} PRIVATE sluice_flags ${A_LINK})
    target_link_options(fuzz_${name} PRIVATE -fsanitize=fuzzer)
    if(NOT TARGET fuzzers) # all of them, and nothing else
      add_custom_target(fuzzers)
    endif()
    add_dependencies(fuzzers fuzz_${name})
  endif()
endfunction()
